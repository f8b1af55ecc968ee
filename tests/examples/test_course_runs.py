"""The course, executed in both languages: minutes, where Jupyter is installed."""

import importlib.util
import os
import re
import shutil
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

EXERCISES = 22
# What a check must refuse: an answer to each exercise that is nearly right.
WRONG = """
NEARLY = {
    1: {"SGD": 0.04, "Adam": 0.04},  # the unit forgotten in the gradient
    2: 0.05,  # v debiased
    3: (0.0, 5.0),
    4: 1 - 0.5 / 10,
    5: 1 - 0.99**3,
    6: 4 * (1 - 0.99**10),  # the variance
    7: (0.377, 0.389),
    8: (0.1 * 0.75 / np.sqrt(0.75**2 + 0.75),) * 2,  # inside the root
    9: 0.004,
    10: (1 - 0.9) / np.sqrt(1 - 0.99),
    11: {"a": {"pure"}, "b": {"natural"}, "c": {"ignores scale"}},
    12: lambda alpha, b1, b2, eps: make(alpha, b1, b2, 0.0),
    13: optax.GradientTransformation(  # keeps what went out
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (
            jax.tree.map(lambda u, b: jnp.where(u * b >= 0, u, 0), updates, state),
        ) * 2,
    ),
    14: {"B", "D", "E"},
    15: adam_jax.radam(0.01),
    16: adam_jax.adamax(0.01, b2=0.99),
    17: np.exp(-0.5),
    18: lambda count: 0.1 * jnp.minimum(count / 10, (100 - count) / 90),
    19: storage.stochastic(),
    20: 1024 * 1024,
    21: set("ABDEFI"),
    22: lambda w, g, m, v, t: mended_step(w, g, m, v, t + 1),
}
FOUND = {11: found, 14: {name for name, tx in CHAINS.items() if is_optimizer(tx)}}
from course_helpers import CHECKS
for number, answer in NEARLY.items():
    try:
        CHECKS[number](answer, *([FOUND[number]] if number in FOUND else []))
    except AssertionError:
        print("refused by the check of exercise", number)
    else:
        raise RuntimeError(f"exercise {number} takes {answer!r} for right")
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
    shutil.copy(COURSE / "course_helpers.py", directory)
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
    numbers = re.findall(r"Exercise (\d+) is open\.", printed)
    assert list(map(int, numbers)) == list(range(1, EXERCISES + 1))


def test_with_the_solutions(tmp_path):
    """They stand in the text, and the checks take them and no others."""
    notebook = read("zh")
    for text, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if solution := re.search(r"^\*\*习题 .*<details>.*?```python\n(.*?)```", text.source, re.S):
            before, check = cell.source.rsplit("\n", 1)
            assert check.startswith("check(")
            cell.source = f"{before}\n{solution[1]}{check}"
    notebook.cells.append(nbformat.v4.new_code_cell(WRONG))
    printed = executed(notebook, tmp_path)
    numbers = re.findall(r"习题 (\d+) 已解出", printed)
    assert list(map(int, numbers)) == list(range(1, EXERCISES + 1))
    assert printed.count("refused by the check of exercise") == EXERCISES
