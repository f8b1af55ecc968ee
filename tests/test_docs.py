"""The Python blocks of the README and the guide run, and every public name is documented."""

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
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "examples/guide.md"])
def test_the_blocks_of_a_page_run(page):
    """In their order, in one session."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) > 5
    session: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader's
        for block in blocks:
            exec(compile(block, page, "exec"), session)
    if page == "README.md":  # "w is now 3, b is 1", and the network has learned the same line
        assert float(session["losses"][-1]) < float(session["losses"][0]) / 10
        line = jax.tree.map(float, jax.tree.map(lambda x: x.ravel()[0], session["params"]))
        assert line == pytest.approx({"w": 3, "b": 1}, abs=1e-2)


def test_the_readme_is_short():
    """Its words outside of code, its tables, and the names in code per 100 words."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    words = len(prose.split())
    assert words < 1200
    assert prose.count("\n|---") <= 2
    assert len(re.findall(r"`[^`]+`", prose)) < 6 * words / 100


def test_nothing_is_left_to_be_filled_in():
    """No placeholder that a reader would paste."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.*"), *ROOT.glob("adam_jax/*.md")]
    texts = {page: page.read_text() for page in pages if page.suffix in (".md", ".ipynb", ".html")}
    assert len(texts) > 6
    assert [page.name for page, text in texts.items() if re.search(r"<(address|your) ", text)] == []


def test_links_lead_to_files_and_headings():
    pages = [ROOT / "README.md", *ROOT.glob("examples/**/*.md"), *ROOT.glob("adam_jax/*.md")]
    pages.append(ROOT / ".github" / "CONTRIBUTING.md")
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http", "mailto")):
                continue
            path, _, heading = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), f"{page.name} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert heading in anchors, f"{page.name} links to {target}"


NAMES = [*map.public(), *map.NAMESPACES]


@pytest.mark.parametrize("name", NAMES)
def test_public_docstrings(name):
    """One line of what; functions also their arguments, result, example and source."""
    thing = operator.attrgetter(name)(adam_jax)
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(thing):
        sections = ["Returns:", "Example:", "Source:"]
        if inspect.signature(thing).parameters:
            sections.append("Args:")
        if name in chains.members():
            sections.append("Raises:")
        for section in sections:
            assert section in doc, f"{name} has no {section}"
        assert ">>>" in doc
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


def test_the_guide_names_the_family():
    guide = (ROOT / "examples" / "guide.md").read_text()
    family = guide.partition("\n## The family\n")[2].partition("\n## ")[0]
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
