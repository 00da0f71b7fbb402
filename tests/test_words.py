"""Tests of the wording: every docstring begins as a sentence that stands alone (docs/08-words.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("ablation", "api", "worker", "tools", "benchmarks", "tests")
FRAGMENT = re.compile(r"(Of|The same|See|As|Such|Those)\b")  # what continues another sentence, or points elsewhere


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def fragments(source: str) -> list[tuple[int, str]]:
    """Line and beginning of every docstring that doesn't stand alone."""
    return [(line, text.splitlines()[0]) for line, text in docstrings(source) if FRAGMENT.match(text)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_docstring_begins_as_a_sentence_that_stands_alone(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {path.relative_to(ROOT).as_posix(): fragments(path.read_text("utf-8")) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "beginning", ["Of the run", "The same in float64", "See `f`", "As `f`", "Such rows", "Those of f"]
)
@pytest.mark.parametrize(
    "source", ['"""{}."""', 'def f():\n    """{}."""', 'class C:\n    def f(self):\n        """\n        {}."""']
)
def test_a_fragment_is_found(source: str, beginning: str) -> None:
    assert fragments(source.format(beginning))


def test_a_sentence_is_no_fragment() -> None:
    assert fragments('"""Offsets of the rows. The same holds for columns."""') == []
