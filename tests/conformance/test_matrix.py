"""How large the matrix is, and that what it refuses is refused clearly and without a trace."""

from __future__ import annotations

import re

import pytest

from deltatune.errors import DeltaError, NoSite, Unsupported
from deltatune.injection.switching import deltas
from deltatune.methods import methods
from tests.conformance.cells import CELLS, KEPT_APART, MERGING, REFUSED, REFUSING, TAKEN, UNMERGEABLE, Cell, over
from tests.conformance.trace import trace
from tests.models import MODELS, output

SIZES = {"methods": 10, "architectures": 25, "refused": 33, "merged": 144, "checks": 3359}
"""Written out, so that a change of the matrix is a change of this file."""

EVERYWHERE: dict[str, list[Cell]] = {
    "test_matrix.py::test_refusal_says_what_to_do": REFUSING,
    "test_presence.py::test_backbone_stays_itself": TAKEN,
    "test_presence.py::test_fresh_delta_is_the_identity_where_promised": TAKEN,
    "test_presence.py::test_trained_delta_acts_and_rests": TAKEN,
    "test_detach.py::test_detach_leaves_no_trace": TAKEN,
    "test_detach.py::test_two_deltas_leave_in_any_order": TAKEN,
    "test_detach.py::test_a_delta_comes_back_after_detach": TAKEN,
    "test_copies.py::test_copy_is_independent": TAKEN,
    "test_gradients.py::test_exactly_the_delta_gets_gradients": TAKEN,
    "test_gradients.py::test_budget_is_what_is_counted": TAKEN,
    "test_gradients.py::test_disabled_and_frozen_deltas_want_no_gradients": TAKEN,
    "test_gradients.py::test_one_step_moves_only_the_delta": TAKEN,
    "test_merge.py::test_merged_computes_the_same": MERGING,
    "test_merge.py::test_two_merged_deltas_unmerge_in_any_order": MERGING,
    "test_merge.py::test_merged_for_good": MERGING,
    "test_merge.py::test_what_is_no_weight_says_so": KEPT_APART,
    "test_numerics.py::test_a_half_precision_backbone": TAKEN,
    "test_numerics.py::test_autocast_runs_as_the_plain_backbone_does": TAKEN,
}
"""The tests of the rules, and the cells that each must run on."""


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


def test_the_rules_are_tested_on_every_cell(request: pytest.FixtureRequest) -> None:
    """Collected in full and never skipped, so what passed is what there is."""
    collected: dict[str, set[Cell]] = {}
    for item in request.session.items:
        cell = item.callspec.params.get("cell") if hasattr(item, "callspec") else None
        if isinstance(cell, Cell):
            assert not list(item.iter_markers("skip")) + list(item.iter_markers("skipif")) + list(item.iter_markers("xfail"))
            collected.setdefault(item.nodeid.partition("[")[0].rpartition("/")[2], set()).add(cell)
    options = request.config.option
    if options.keyword or options.markexpr or any(".py" in argument for argument in request.config.args):
        pytest.skip("only a part of the suite was asked for")
    for name, cells in EVERYWHERE.items():
        assert collected.pop(name, cells) == set(cells), name
    assert all(cells < set(TAKEN) for cells in collected.values()), "all other tests are on some of the cells"
    assert sum(map(len, EVERYWHERE.values())) == SIZES["checks"]


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
