"""The course as it is committed: two notebooks with the same code, and with what it gave.

`test_course_runs.py` executes them.
"""

import ast
import importlib.util
import json
import re
import subprocess
from itertools import count
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "examples" / "course"
LANGUAGES = ["en", "zh"]
CHINESE = re.compile("[\u4e00-\u9fff]")
NOTEBOOKS = {
    language: json.loads((COURSE / f"adam.{language}.ipynb").read_text(encoding="utf-8"))
    for language in LANGUAGES
}
in_each_language = pytest.mark.parametrize("language", LANGUAGES)


def sources(language, kind):
    cells = NOTEBOOKS[language]["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def outputs(language):
    cells = NOTEBOOKS[language]["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def test_the_code_is_the_same():
    assert sources("en", "code") == sources("zh", "code")
    en, zh = ([c["cell_type"] for c in NOTEBOOKS[lang]["cells"]] for lang in LANGUAGES)
    assert en == zh


def test_what_it_gave_is_the_same():
    """The pictures too, to the last bit: there is no language in them."""
    assert outputs("en") == outputs("zh")


@in_each_language
def test_committed_as_executed_from_top_to_bottom(language):
    code = [c for c in NOTEBOOKS[language]["cells"] if c["cell_type"] == "code"]
    for cell, number in zip(code, count(1), strict=False):
        assert cell["execution_count"] == number
        # What it printed in one piece, and a picture: no error, warning or progress bar.
        kinds = sorted(out.get("name", "picture") for out in cell["outputs"])
        assert kinds in ([], ["stdout"], ["picture"], ["picture", "stdout"])
        shown = re.search(r"^(plt\.show|draw_bowl)\(", "".join(cell["source"]), re.M)
        pictures = [set(out["data"]) for out in cell["outputs"] if "data" in out]
        assert pictures == ([{"image/png"}] if shown else [])
    assert "widgets" not in NOTEBOOKS[language]["metadata"]


@in_each_language
def test_under_a_megabyte(language):
    assert (COURSE / f"adam.{language}.ipynb").stat().st_size < 1_000_000


def test_the_text_has_the_same_parts():
    """Headings, displayed formulas, tables, code and exercises, each cell by itself."""
    parts = {
        "headings": re.compile(r"^#+(?= )", re.M),
        "formulas": re.compile(r"\$\$.*?\$\$", re.S),
        "code": re.compile(r"```.*?```", re.S),
        "solutions": re.compile(r"</?details>"),
        "table rows": re.compile(r"^\|", re.M),
        "items": re.compile(r"^(?:- |\d\. )", re.M),
        "links": re.compile(r"\]\((?!#|adam\.)(.*?)\)"),
    }
    for en, zh in zip(sources("en", "markdown"), sources("zh", "markdown"), strict=True):
        for name, pattern in parts.items():
            assert pattern.findall(en) == pattern.findall(zh), (name, en[:60])


def test_each_text_is_in_its_language():
    for en, zh in zip(sources("en", "markdown"), sources("zh", "markdown"), strict=True):
        assert CHINESE.search(zh)
        assert not CHINESE.search(en)


@in_each_language
def test_links(language):
    """Each leads to a file that is there, or to a heading of this notebook."""
    text = "\n".join(sources(language, "markdown"))
    headings = {h.replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (COURSE / target).is_file(), target


def colors(source):
    """The literal that is assigned to COLORS."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLORS":
            return ast.literal_eval(node.value)


def test_one_optimizer_has_one_colour_everywhere():
    everywhere = colors((ROOT / "examples" / "compare.py").read_text())
    assert len(everywhere) == 7
    assert everywhere in map(colors, sources("en", "code"))


def test_the_first_cell_installs_only_where_the_package_is_missing(monkeypatch):
    first, commands = sources("en", "code")[0], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(first, {})
    assert (COURSE / commands[0][-1]).resolve() == ROOT
