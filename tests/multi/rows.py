"""What routed batches are compared with: every row run by itself, with its deltas switched on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.injection.compose import Composition
from deltatune.injection.ledger import ledger_of
from deltatune.injection.switching import deltas, switch
from deltatune.multi.routing import Entry, route
from tests.models import VOCABULARY, output

Inputs = dict[str, Tensor]


def batch(rows: int, length: int = 7, padding: bool = True, seed: int = 5) -> Inputs:
    """Token ids (rows, length), every third row with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[::3, -2:] = 0
        ids[::3, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def row(inputs: Inputs, i: int) -> Inputs:
    return {name: value[i : i + 1] for name, value in inputs.items()}


def use(backbone: nn.Module, entry: Entry) -> None:
    """Let exactly this entry act, in its order."""
    switch(backbone, None)
    ledger = ledger_of(backbone)
    listed: Sequence[Any] = [entry] if entry is None or isinstance(entry, str) else list(entry)
    for name in listed:
        if name is not None:
            assert ledger is not None
            handle: Any = ledger.compositions.get(name) or ledger.delta(name)
            handle.enable()


def naive(backbone: nn.Module, entries: Sequence[Entry], inputs: Inputs) -> list[Tensor]:
    """The output of every row, computed alone."""
    found = []
    for i, entry in enumerate(entries):
        use(backbone, entry)
        found.append(output(backbone, row(inputs, i))[0])
    switch(backbone, None)
    return found


def routed(backbone: nn.Module, entries: Sequence[Entry], inputs: Inputs) -> Tensor:
    with route(backbone, entries):
        return output(backbone, inputs)


def far(found: Tensor, expected: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


def all_on(backbone: nn.Module) -> None:
    """Enable every delta, so that each wants gradients."""
    for delta in deltas(backbone):
        if not isinstance(delta, Composition):
            delta.enable()


def forget(backbone: nn.Module) -> None:
    """No parameter has a gradient."""
    for parameter in backbone.parameters():
        parameter.grad = None
