"""How large the matrix is, that all of it is tested, and that what it refuses is refused clearly and without a trace."""

from __future__ import annotations

import re

import pytest
import torch

import deltatune as dt
from deltatune.errors import DeltaError, NoSite, Unsupported
from tests.conformance.cells import CELLS, KEPT_APART, MERGING, REFUSED, REFUSING, TAKEN, TRAINING, UNMERGEABLE, Cell, over, plain
from tests.conformance.rules import RULES
from tests.conformance.trace import trace
from tests.models import MODELS, SORTS, output

SIZES = {"methods": 49, "architectures": 25, "refused": 96, "merged": 674, "checks": 19508}
"""Written out, so that a change of the matrix is a change of this line; the test's message has the line to write."""


def sizes() -> dict[str, int]:
    """The same, counted: a check is one rule on one cell."""
    checks = len(REFUSING) + sum(map(len, RULES.values()))
    return {"methods": len(TRAINING), "architectures": len(MODELS), "refused": len(REFUSING), "merged": len(MERGING), "checks": checks}


def test_the_matrix_is_whole() -> None:
    assert sizes() == SIZES, f"if this is meant, write\nSIZES = {sizes()}".replace("'", '"')
    assert len(CELLS) == len(set(CELLS)) == len(TRAINING) * len(MODELS)
    assert len(TAKEN) + len(REFUSING) == len(CELLS)
    assert len(MERGING) + len(KEPT_APART) == len(TAKEN)
    assert all(set(cells) in (set(TAKEN), set(MERGING), set(KEPT_APART)) for cells in RULES.values())
    assert sum(map(len, SORTS.values())) == len(MODELS)


def test_the_tables_name_what_exists() -> None:
    for table in (REFUSED, UNMERGEABLE):
        assert table.keys() - set(TRAINING) == set()
        assert frozenset().union(*table.values()) - MODELS.keys() == set()


WHOLE = {"test_rules.py::test_the_rules_hold": TAKEN, "test_matrix.py::test_refusal_says_what_to_do": REFUSING}


def test_every_cell_is_tested(request: pytest.FixtureRequest) -> None:
    """Collected in full and never skipped, so what passed is what there is."""
    collected: dict[str, list[Cell]] = {}
    for item in request.session.items:
        cell = item.callspec.params.get("cell") if hasattr(item, "callspec") else None
        if isinstance(cell, Cell):
            name = item.nodeid.partition("[")[0].rpartition("/")[2]
            assert name not in WHOLE or not any(next(item.iter_markers(mark), None) for mark in ("skip", "skipif", "xfail")), item.nodeid
            collected.setdefault(name, []).append(cell)
    options = request.config.option
    if options.keyword or getattr(options, "lf", False) or any(".py" in argument for argument in request.config.args):
        pytest.skip("only a part of the suite was asked for")
    assert {name: collected.pop(name) for name in WHOLE} == WHOLE
    assert all(set(cells) < set(TAKEN) for cells in collected.values()), "all other tests are on some of the cells"


@over(REFUSING)
def test_refusal_says_what_to_do(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    before = trace(backbone)
    with pytest.raises(DeltaError) as caught:
        cell.attach(backbone)
    message = str(caught.value)
    assert caught.type in (NoSite, Unsupported)
    assert type(backbone).__name__ in message or re.search(r"at `[^`]*`", message), message
    assert re.search(r"List the sites|Choose|Use |Load ", message), message
    assert trace(backbone).differences(before) == []
    assert dt.deltas(backbone) == []
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain(cell.model))
