"""The README's Python blocks run in their order, and every public name is documented."""

import inspect
import operator
import re
import tomllib
from pathlib import Path

import chains
import jax
import pytest
import tables

import adam_jax

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_blocks_run():
    assert BLOCKS
    session: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as a reader's session is
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), session)


STORAGES = ["cast", "stochastic", "int8", "int4", "factored", "block_mean",
            "transformer_blocks", "report"]  # fmt: skip
TASKS = ["gram", "combine", "weighted", "mgda", "cagrad", "pcgrad", "aligned_mtl", "gradnorm",
         "per_task", "GradnormState"]  # fmt: skip
BASES = ["Basis", "eigenvectors", "Eigenvectors", "singular_vectors", "SingularVectors",
         "InBasisState"]  # fmt: skip
RULES = ["squared", "belief", "yogi", "infinity", "accumulated", "from_first_gradient"]
MODULES = [f"basis.{name}" for name in BASES] + [f"rules.{name}" for name in RULES]
MODULES += [f"storage.{name}" for name in STORAGES] + [f"tasks.{name}" for name in TASKS]


@pytest.mark.parametrize("name", adam_jax.__all__ + MODULES)
def test_public_docstrings(name):
    """One line of what; functions also their arguments, result, example and source.

    What the optimizers return stands once, in the docstring of their module.
    """
    thing = operator.attrgetter(name)(adam_jax)
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(thing):
        sections = ["Example:", "Source:"]
        if name not in chains.members():
            sections.append("Returns:")
        if inspect.signature(thing).parameters:
            sections.append("Args:")
        for section in sections:
            assert section in doc, f"{name} has no {section}"
        assert ">>>" in doc
        if "rguments are those of `adam`" not in doc:
            for parameter in inspect.signature(thing).parameters:
                assert f"{parameter}:" in doc, f"{name} does not document {parameter}"


def test_every_stage_is_in_the_table_of_the_tests():
    """So that all laws are checked of a new one."""
    returned = {
        name: inspect.signature(thing).return_annotation
        for name, thing in vars(adam_jax).items()
        if name in adam_jax.__all__ and inspect.isfunction(thing)
    }
    stages = {name for name, of in returned.items() if "GradientTransformation" in str(of)}
    around = {"in_basis", "fuse", "lazy"}  # a chain
    assert {name.split()[0] for name in tables.STAGES} == stages - around - tables.MEMBERS.keys()


def test_the_table_of_the_family_is_the_code():
    """Print it with `python tests/chains.py`."""
    assert chains.table() in (ROOT / "README.md").read_text()


def test_no_runtime_dependency_but_jax_and_optax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"jax", "jaxlib", "optax"}
