"""Two models made from one config object: what is attached to one is nothing to the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from tests.conformance.cells import TAKEN, Cell, fresh, plain, shake
from tests.conformance.sample import SORT_OF, pairwise
from tests.conformance.trace import trace
from tests.models import output

CELLS = pairwise((cell for cell in TAKEN if SORT_OF[cell.model] not in ("torch", "plain")), ("method",), ("act", "model"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
@torch.no_grad()
def test_two_models_from_one_config_object(cell: Cell) -> None:
    one, inputs = _model(cell)
    with torch.random.fork_rng(devices=[]):
        other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    assert other.config is one.config
    befores = trace(one), trace(other)
    delta = cell.attach(one)
    shake(delta)
    acting = output(one, inputs)
    assert torch.equal(output(other, inputs), plain(cell.model))
    second = cell.attach(other)
    shake(second, seed=4)
    assert torch.equal(output(one, inputs), acting)
    both = output(other, inputs)
    dt.detach(delta)
    assert torch.equal(output(other, inputs), both)
    assert torch.equal(output(one, inputs), plain(cell.model))
    dt.detach(second)
    assert torch.equal(output(other, inputs), plain(cell.model))
    assert [now.differences(before) for now, before in zip((trace(one), trace(other)), befores, strict=True)] == [[], []]


def _model(cell: Cell) -> tuple[Any, dict[str, torch.Tensor]]:
    return fresh(cell.model)
