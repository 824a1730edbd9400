"""The decisions are in order, and the tests that decision 4 names exist."""

from __future__ import annotations

import ast
import re

from tests.project import ROOT

PAGES = sorted((ROOT / "docs" / "decisions").glob("0*.md"))


def test_every_page_is_listed_in_order() -> None:
    listed = re.findall(r"\[(\d+)\]\((\S+\.md)\)", (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8"))
    assert [name for _, name in listed] == [page.name for page in PAGES]
    assert [int(number) for number, _ in listed] == list(range(1, len(PAGES) + 1))


def test_the_tests_that_are_named_exist() -> None:
    """`injection/test_slot.py::test_name` below `tests`; `rules/leaving.py::a_rule` in `tests/conformance`."""
    named = re.findall(r"`([a-z_0-9/]+\.py)(?:::([a-z_0-9]+))?`", PAGES[3].read_text(encoding="utf-8"))
    assert len(named) > 100
    folders = (ROOT / "tests", ROOT / "tests" / "conformance", ROOT)
    missing = []
    for path, function in named:
        file = next((folder / path for folder in folders if (folder / path).exists()), None)
        defined = {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)} if file else set()
        if file is None or (function and function not in defined):
            missing.append(f"{path}::{function}")
    assert missing == []
