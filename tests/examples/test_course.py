"""The course as it is committed: two notebooks, the same code in two languages, and what it gave.

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
# English in the code of the Chinese edition: the law that exercise 11 asks for, and a place.
ALLOWED = {"ignores scale", "upper right", "outside lower center"}
in_each_language = pytest.mark.parametrize("language", LANGUAGES)


def sources(language, kind):
    cells = NOTEBOOKS[language]["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def outputs(language):
    cells = NOTEBOOKS[language]["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


class WithoutWords(ast.NodeTransformer):
    """Strings become empty; of an f-string what it formats stays."""

    def visit_JoinedStr(self, node):
        formatted = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        return ast.Tuple([self.visit(part) for part in formatted], ast.Load())

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


def without_words(code):
    return ast.dump(WithoutWords().visit(ast.parse(code)))


def test_the_code_is_the_same():
    """But for its strings and comments, which are in the language of the edition."""
    for en, zh in zip(sources("en", "code"), sources("zh", "code"), strict=True):
        assert without_words(en) == without_words(zh)
    en, zh = ([c["cell_type"] for c in NOTEBOOKS[lang]["cells"]] for lang in LANGUAGES)
    assert en == zh


def test_what_it_gave_is_the_same():
    """The same numbers in the same order, and as many pictures."""
    for en, zh in zip(outputs("en"), outputs("zh"), strict=True):
        printed = ["".join("".join(out.get("text", "")) for out in outs) for outs in (en, zh)]
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", text)) for text in printed]
        assert numbers[0] == numbers[1]
        assert sum("data" in out for out in en) == sum("data" in out for out in zh)


@in_each_language
def test_committed_as_executed_from_top_to_bottom(language):
    code = [c for c in NOTEBOOKS[language]["cells"] if c["cell_type"] == "code"]
    for cell, number in zip(code, count(1), strict=False):
        assert cell["execution_count"] == number
        # What it printed in one piece, and a picture: no error, warning or progress bar.
        kinds = sorted(out.get("name", "picture") for out in cell["outputs"])
        assert kinds in ([], ["stdout"], ["picture"], ["picture", "stdout"])
        shown = re.search(r"^(plt\.show|draw)\(", "".join(cell["source"]), re.M)
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
            found = [list(map(without_comments, pattern.findall(text))) for text in (en, zh)]
            assert found[0] == found[1], (name, en[:60])


def without_comments(text):
    return re.sub("# .*", "", text) if text.startswith("```") else text


def test_each_text_is_in_its_language():
    """The English text quotes the article's title and names."""
    for en, zh in zip(sources("en", "markdown"), sources("zh", "markdown"), strict=True):
        assert CHINESE.search(zh)
        assert len(CHINESE.findall(en)) < len(re.findall("[a-z]", en)) / 2


def test_one_term_for_one_thing():
    chinese = "\n".join(sources("zh", "markdown"))
    assert not re.search("环节|流水线|提前停止|横向|纵向", chinese)


def test_the_words_of_pictures_and_messages_are_chinese():
    """Whole English phrases in the code of the Chinese edition are names of the package."""
    for code in sources("zh", "code"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                phrase = re.search(r"\b[a-z]{3,} [a-z]{2,}\b", node.value)
                assert not phrase or node.value in ALLOWED, node.value
        for comment in re.findall("# .*", code):
            assert not re.search(r"\b[a-z]{3,} [a-z]{2,}", comment), comment


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
    everywhere = colors((ROOT / "examples" / "drawing.py").read_text())
    assert len(everywhere) == 7
    assert everywhere == colors((COURSE / "course_helpers.py").read_text(encoding="utf-8"))


def test_the_first_cell_installs_only_where_the_package_is_missing(monkeypatch):
    first, commands = sources("en", "code")[0], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(first, {})
    assert (COURSE / commands[0][-1]).resolve() == ROOT


def solutions(language):
    """By the number of the exercise: the code of its solution."""
    pattern = re.compile(r"^\*\*(?:Exercise|习题) (\d+).*?```python\n(.*?)```", re.S)
    found = [pattern.match(text) for text in sources(language, "markdown")]
    return {int(match[1]): match[2] for match in found if match}


@in_each_language
def test_each_chapter_has_an_aim_a_summary_and_two_exercises(language):
    text = "\n".join(sources(language, "markdown"))
    chapters = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(chapters) == 10
    for chapter in chapters:
        for words in ("Aim|目标", "Needs|预备知识", "Summary|小结|Summary of the course|全书小结"):
            assert re.search(rf"\*\*(?:{words})[.。]\*\*", chapter), (words, chapter[:40])
        assert len(re.findall(r"^\*\*(?:Exercise|习题) \d+", chapter, re.M)) >= 2
    assert list(solutions(language)) == list(range(1, 23))


def test_no_address_to_fill_in():
    assert "<address" not in (COURSE / "adam.en.ipynb").read_text(encoding="utf-8")
    assert "<address" not in (COURSE / "adam.zh.ipynb").read_text(encoding="utf-8")
