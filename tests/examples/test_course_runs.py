"""The course, executed in both languages: minutes, where Jupyter is installed."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).parents[2] / "examples" / "course"

if importlib.util.find_spec("jupyterlab"):
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient import NotebookClient
else:
    # Nothing is collected then, and a run of this file alone ends with exit code 5: CI cannot pass.
    pytest.skip(
        "needs Jupyter: pip install -e '.[course]' && "
        "python -m pytest tests/examples/test_course_runs.py",
        allow_module_level=True,
    )

EXERCISES = 4
# What a check must refuse: an answer to each exercise that is nearly right.
WRONG = """
for check, answer in (
    (check_weight, 1 - 0.99**3),
    (check_broken, {"a": {"pure"}, "b": {"natural"}, "c": {"ignores scale"}}),
    (check_member, adam_jax.radam(0.01)),
    (check_storage, storage.stochastic()),
):
    try:
        check(answer)
    except AssertionError:
        print("refused by", check.__name__)
    else:
        raise RuntimeError(f"{check.__name__} takes {answer!r} for right")
"""


class ThisInterpreter(AsyncKernelManager):
    """Its kernel, whatever other kernels Jupyter knows of."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, language="python", display_name="Python 3")


def read(language):
    return nbformat.read(COURSE / f"adam.{language}.ipynb", as_version=4)


def executed(notebook, directory):
    """What it prints. A cell that fails is an error; it must draw as much as what is committed."""
    pictures = sum(map(count_pictures, notebook.cells))
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=600,
        resources={"metadata": {"path": str(directory)}},
    )
    # Compiled as for a user: conftest.py has told this process otherwise.
    client.execute(env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
    assert sum(map(count_pictures, notebook.cells)) == pictures > 0
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    return "".join(out.get("text", "") for out in outputs)


def count_pictures(cell):
    return sum("image/png" in out.get("data", {}) for out in cell.get("outputs", ()))


def test_as_it_is(tmp_path):
    printed = executed(read("en"), tmp_path)
    assert re.findall(r"Exercise (\d) is open\.", printed) == list("1234")


def test_with_the_solutions(tmp_path):
    """They stand in the text, and the checks take them and no others."""
    notebook, solved = read("zh"), 0
    for text, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if solution := re.search(r"<details>.*?```python\n(.*?)```", text.source, re.S):
            cell.source += "\n" + solution[1]
            solved += 1
    assert solved == EXERCISES
    notebook.cells.append(nbformat.v4.new_code_cell(WRONG))
    printed = executed(notebook, tmp_path)
    assert re.findall(r"Exercise (\d) is solved\.", printed) == list("1234")
    assert printed.count("refused by check_") == EXERCISES
