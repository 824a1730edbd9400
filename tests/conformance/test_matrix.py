"""How large the matrix is, and that what it refuses is refused clearly and without a trace."""

from __future__ import annotations

import re

import pytest

from deltatune.errors import DeltaError, NoSite, Unsupported
from deltatune.injection.attach import deltas
from deltatune.methods import methods
from tests.conformance.cells import CELLS, KEPT_APART, MERGING, REFUSED, REFUSING, TAKEN, UNMERGEABLE, Cell, over
from tests.conformance.trace import trace
from tests.models import MODELS, output

SIZES = {"methods": 10, "architectures": 25, "refused": 33, "merged": 144}
"""Written out, so that a change of the matrix is a change of this file."""


def test_the_matrix_is_whole() -> None:
    assert len(methods) == SIZES["methods"]
    assert len(MODELS) == SIZES["architectures"]
    assert len(CELLS) == len(set(CELLS)) == SIZES["methods"] * SIZES["architectures"] == 250
    assert len(REFUSING) == SIZES["refused"] == sum(map(len, REFUSED.values()))
    assert len(MERGING) == SIZES["merged"]
    assert len(TAKEN) == len(MERGING) + len(KEPT_APART) == len(CELLS) - len(REFUSING)


def test_the_tables_name_what_exists() -> None:
    for table in (REFUSED, UNMERGEABLE):
        assert table.keys() <= set(methods)
        assert frozenset().union(*table.values()) <= MODELS.keys()


def test_every_test_of_the_matrix_collects_every_cell(request: pytest.FixtureRequest) -> None:
    collected: dict[str, set[Cell]] = {}
    for item in request.session.items:
        cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")  # type: ignore[attr-defined]
        if isinstance(cell, Cell) and getattr(item.function, "whole_matrix", False):  # type: ignore[attr-defined]
            collected.setdefault(item.nodeid.partition("[")[0], set()).add(cell)
    expected = {frozenset(cells) for cells in (CELLS, TAKEN, REFUSING, MERGING, KEPT_APART)}
    narrowed = [name for name, cells in collected.items() if frozenset(cells) not in expected]
    chosen = any("::" in argument for argument in request.config.args) or request.config.option.keyword
    assert chosen or not narrowed


@over(REFUSING)
def test_refusal_says_what_to_do(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    before, expected = trace(backbone), output(backbone, inputs)
    with pytest.raises(DeltaError) as caught:
        cell.attach(backbone)
    message = str(caught.value)
    assert caught.type in (NoSite, Unsupported)
    assert type(backbone).__name__ in message or re.search(r"at `[^`]*`", message), message
    assert re.search(r"List the sites|Choose|Use |Load ", message), message
    assert not trace(backbone).differences(before)
    assert not deltas(backbone)
    assert output(backbone, inputs).equal(expected)
