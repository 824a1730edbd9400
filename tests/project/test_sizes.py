"""Files, functions, classes and method configurations stay small; no file is named for nothing in particular."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.project import PACKAGE, ROOT

SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, USUAL_FUNCTION_LINES = 500, 80, 60
PUBLIC_METHODS, FIELDS = 12, 8
NOTHING_NAMES = {"utils", "util", "helper", "helpers", "manager", "wrapper", "misc", "common"}

Node = TypeVar("Node", bound=ast.AST)


def nodes(paths: list[Path], *kinds: type[Node]) -> Iterator[tuple[str, Node]]:
    """(file:line, node) for each node of the kinds."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def functions() -> dict[str, int]:
    """Length in lines of each function of the package, docstring included."""
    found: Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = nodes(SOURCES, ast.FunctionDef, ast.AsyncFunctionDef)
    return {f"{where} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1 for where, node in found}


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES
    assert path.stem not in NOTHING_NAMES


def test_functions() -> None:
    lengths = functions()
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}
    long = {name: lines for name, lines in lengths.items() if lines > USUAL_FUNCTION_LINES}
    assert len(long) <= 0.05 * len(lengths), long


def is_public_method(node: ast.stmt) -> bool:
    """A method called by name; properties read as attributes and do not count."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return False
    return not any(ast.unparse(decorator).endswith(("property", ".setter")) for decorator in node.decorator_list)


def test_classes() -> None:
    counts = {f"{where} {node.name}": sum(map(is_public_method, node.body)) for where, node in nodes(SOURCES, ast.ClassDef)}
    assert counts
    assert {name: count for name, count in counts.items() if count > PUBLIC_METHODS} == {}


def test_method_configurations() -> None:
    package = importlib.import_module("deltatune.methods")
    for module in pkgutil.walk_packages(package.__path__, "deltatune.methods."):
        importlib.import_module(module.name)
    kinds = importlib.import_module("deltatune.methods.kinds")
    recipes = {name: kinds.methods[name] for name in kinds.methods}
    assert recipes
    for name, recipe in recipes.items():
        assert recipe.__dataclass_params__.frozen, name
        assert len(dataclasses.fields(recipe)) <= FIELDS, name
        assert not recipe.__subclasses__(), f"{name} is final"


def test_nothing_is_left_unfinished() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    left = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if any(m in line for m in marks)
    ]
    assert left == []


def test_no_exception_is_swallowed() -> None:
    def swallows(handler: ast.ExceptHandler) -> bool:
        broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
        return broad and all(isinstance(node, ast.Pass | ast.Continue) for node in handler.body)

    assert [where for where, node in nodes(SOURCES, ast.ExceptHandler) if swallows(node)] == []
