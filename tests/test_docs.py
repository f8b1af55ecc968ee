"""The README's Python blocks run in their order, and every public name is documented."""

import graphlib
import inspect
import operator
import re
import tomllib
from pathlib import Path

import chains
import jax
import map
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


NAMES = [*map.public(), *map.NAMESPACES]


@pytest.mark.parametrize("name", NAMES)
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
    around = {"in_basis", "fuse", "lazy", "stacked"}  # a chain
    assert {name.split()[0] for name in tables.STAGES} == stages - around - tables.MEMBERS.keys()


def test_the_readme_names_the_family():
    family = (
        (ROOT / "README.md").read_text().partition("\n## The family\n")[2].partition("\n## ")[0]
    )
    assert set(chains.members()) <= set(re.findall(r"`(\w+)`", family))


def test_no_runtime_dependency_but_jax_and_optax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"jax", "jaxlib", "optax"}


def test_the_map_is_the_code():
    """Print it with `python tests/map.py > adam_jax/README.md`."""
    assert map.text() == (ROOT / "adam_jax" / "README.md").read_text()
    files = re.findall(r"\]\(([\w/]+\.py|[\w/]+/)\)", map.text())
    assert len(files) == len(set(files)) == len([*map.modules()]) - 1  # of all but the package


def test_no_module_imports_one_that_imports_it():
    graph = map.imports()
    assert graph["adam_jax.moments"] >= {"adam_jax.signal", "adam_jax.storage._protocol"}
    list(graphlib.TopologicalSorter(graph).static_order())  # or a CycleError, that names a cycle
