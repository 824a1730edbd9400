"""Rule 7: attaching, switching and detaching the fifteenth delta take the steps the third took, and walk no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from deltatune.injection.attach import detach
from deltatune.injection.switching import deltas, switch
from tests.conformance.cells import TAKEN, Cell
from tests.conformance.sample import pairwise
from tests.models import output

MODELS = ("bert", "gpt2", "mixtral", "torch_encoder", "tied_mlp")
FEW, MANY = 3, 15


def steps(function: Callable[[], Any]) -> int:
    """How many Python and C functions a call runs: a cost that no other load on the machine changes."""
    count = 0

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("cell", pairwise((cell for cell in TAKEN if cell.model in MODELS), ("method",), ("act", "model")), ids=str)
@torch.no_grad()
def test_the_fifteenth_costs_what_the_third_did(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    attaching, switching, running = [], [], []
    for k in range(MANY):
        name = f"d{k}"
        attaching.append(steps(lambda name=name: cell.attach(backbone, name=name)))  # type: ignore[misc]
        output(backbone, inputs)  # a host has been seen to run
        running.append(steps(lambda: output(backbone, inputs)))
        switch(backbone, None)
        switching.append(steps(lambda name=name: switch(backbone, name)))  # type: ignore[misc]
        switch(backbone, None)
    detaching = [steps(lambda: detach(deltas(backbone)[-1])) for _ in range(MANY)][::-1]
    costs = {"attach": attaching, "switch": switching, "detach": detaching}
    if cell.model != "torch_encoder":  # whose layers look for hooks on every module below them, ours included
        costs["forward"] = running
    for what, cost in costs.items():
        assert cost[MANY - 1] <= 1.05 * cost[FEW - 1], f"{what}: {cost[FEW - 1]} steps, then {cost[MANY - 1]}"


@pytest.mark.parametrize("cell", [cell for cell in TAKEN if cell.model == "bert"], ids=str)
def test_no_walk_over_the_model(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = cell.fresh()
    size = len(list(backbone.modules()))
    first = cell.attach(backbone, name="first")
    longest, plain = 0, nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        nonlocal longest
        for k, found in enumerate(plain(self, *args, **kwargs)):
            longest = max(longest, k)
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    second = cell.attach(backbone, name="second")
    switch(backbone, "first")
    switch(backbone, "second")
    detach(second)
    assert longest < size / 4
    monkeypatch.undo()
    detach(first)
