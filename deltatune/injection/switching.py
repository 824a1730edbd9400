"""Switching: which of the attached deltas act, at once and for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from deltatune.errors import UnknownName
from deltatune.injection.delta import Delta
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.refusals import check_unmerged


def deltas(backbone: nn.Module) -> list[Delta]:
    """The attached deltas, in the order they were attached."""
    ledger = ledger_of(backbone)
    return [] if ledger is None else list(ledger.deltas.values())


def switch(backbone: nn.Module, name: str | None) -> None:
    """Let one delta or composition act and all others rest; None rests them all. Costs the same however many are attached.

    Raises:
        UnknownName: nothing attached has that name.
        Unsupported: a delta that would have to rest is merged; nothing is changed then.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        if name is not None:
            raise UnknownName(f"Cannot switch to delta `{name}`: nothing is attached to this backbone. Attach or load it first.")
        return
    chosen = None if name is None else ledger.compositions.get(name) or ledger.delta(name)
    others = [acting for term in ledger.terms if (acting := ledger.acting(term)) is not chosen]
    for other in others:
        if isinstance(other, Delta):
            check_unmerged(other, "disable")
    for other in others:
        other.disable()
    if chosen is not None:
        chosen.enable()


def refresh(backbone: nn.Module) -> None:
    """Forget what was computed ahead from the parameters.

    While nothing needs gradients, deltas of the weight kinds keep their effective weights from one forward to the next.
    In-place operations and optimizers tell that they wrote a parameter; ``parameter.data`` does not, so call this then.
    """
    ledger = ledger_of(backbone)
    if ledger is not None:
        ledger.arrange(ledger.acting_deltas)


@contextmanager
def disabled(backbone: nn.Module) -> Iterator[None]:
    """The plain backbone for a moment: no delta acts, and all act again as before at the end.

    Merged deltas stay in the weights: unmerge them first.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        yield
        return
    acting = ledger.acting_deltas
    ledger.resting += 1
    ledger.arrange(acting)
    try:
        yield
    finally:
        ledger.resting -= 1
        ledger.arrange(ledger.acting_deltas)
        for name in ledger.acting_deltas:
            refresh_gradients(ledger.deltas[name])


@contextmanager
def unchanged(backbone: nn.Module, ledger: Ledger) -> Iterator[None]:
    """The backbone's own weights for a moment, without what is selected and what is merged."""
    merged = [(kept.module.get_parameter(kept.name), kept.original) for kept in ledger.kept]
    held = [theta.detach().clone() for theta, _ in merged]
    with disabled(backbone), torch.no_grad():
        for theta, original in merged:
            theta.copy_(original)
        try:
            yield
        finally:
            for (theta, _), value in zip(merged, held, strict=True):
                theta.copy_(value)
