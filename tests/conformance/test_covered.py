"""The page that says where each sentence of the design is tested names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "decisions" / "0004-what-is-tested-where.md"


def test_the_tests_of_the_page_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 80
    functions: dict[str, set[str]] = {}
    for file, _ in named:
        tree = ast.parse((TESTS / file).read_text())
        functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [f"{file}::{name}" for file, name in named if name not in functions[file]] == []
