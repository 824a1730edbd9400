"""Two copies are fine while they are short: no block of more than six lines stands twice in the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tests.project import PACKAGE

LINES = 6
DATA = PACKAGE / "structure" / "architectures"


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of what a reader would call code: no docstrings, comments, imports, blank lines or lone brackets."""
    source = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = ((number, line.strip()) for number, line in enumerate(source.splitlines(), 1) if number not in skipped)
    return [(number, line) for number, line in lines if not line.startswith("#") and any(letter.isalnum() for letter in line)]


def duplicates(paths: list[Path]) -> dict[str, list[str]]:
    """First line of each block of more than ``LINES`` lines that occurs more than once -> where."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        lines = code_lines(path)
        for start in range(len(lines) - LINES):
            block = tuple(text for _, text in lines[start : start + LINES + 1])
            places[block].append(f"{path.name}:{lines[start][0]}")
    return {block[0]: where for block, where in places.items() if len(where) > 1}


def test_no_block_stands_twice() -> None:
    assert duplicates([path for path in sorted(PACKAGE.rglob("*.py")) if DATA not in path.parents]) == {}


def test_a_copied_block_is_found(tmp_path: Path) -> None:
    block = "\n".join(f"value_{number} = {number}" for number in range(LINES + 1))
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f'"""{name}"""\nimport {name[:3]}\n\n{block}\n')
    assert duplicates(sorted(tmp_path.glob("*.py"))) == {"value_0 = 0": ["one.py:4", "two.py:4"]}
