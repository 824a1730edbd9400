"""A sample leaves nothing out that it says it crosses."""

from __future__ import annotations

import pytest

from deltatune.methods.kinds import TokenPatch
from tests.conformance.cells import TAKEN, TRAINING
from tests.conformance.sample import ACTS, SORT_OF, acts_of, pairwise, representatives
from tests.models import MODELS, SORTS

BY_A_FIELD = {TokenPatch}
"""What no method does unless a field asks for it, as LoReFT's positions do; the test of that method has it."""


def test_every_method_meets_every_sort_and_every_architecture_every_way_of_acting() -> None:
    sample = pairwise(TAKEN)
    assert set(sample) < set(TAKEN)
    assert {(cell.method, SORT_OF[cell.model]) for cell in sample} == {(cell.method, SORT_OF[cell.model]) for cell in TAKEN}
    acting = [{(cell.model, act) for cell in cells for act in acts_of(cell.method)} for cells in (sample, TAKEN)]
    assert acting[0] == acting[1]


@pytest.mark.parametrize("crossing", [("method",), ("model",), ("act", "sort"), ("method", "model")])
def test_a_crossing_is_covered(crossing: tuple[str, ...]) -> None:
    sample = pairwise(TAKEN, crossing)
    assert {cell.method for cell in sample} == set(TRAINING) or "method" not in crossing
    assert {cell.model for cell in sample} == set(MODELS) or "model" not in crossing
    assert crossing != ("method", "model") or sample == TAKEN


def test_every_method_is_known_to_act_somehow() -> None:
    assert [method for method in TRAINING if not acts_of(method)] == []
    assert set(SORT_OF) == set(MODELS)
    assert set(SORT_OF.values()) == set(SORTS)
    used = {act for method in TRAINING for act in acts_of(method)}
    assert used == set(ACTS) - BY_A_FIELD, "a way of acting that no method has is not tested by the matrix"
    assert set(representatives("bert")) <= used
