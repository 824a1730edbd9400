"""Switching: which of the attached deltas act, at once and for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, UnknownName
from deltatune.injection.delta import Delta
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.refusals import check_alone, check_selects_unmerged, check_unmerged
from deltatune.methods.kinds import SelectionPatch


def deltas(backbone: nn.Module) -> list[Delta]:
    """The attached deltas, in the order they were attached."""
    ledger = ledger_of(backbone)
    return [] if ledger is None else list(ledger.deltas.values())


def switch(backbone: nn.Module, name: str | None) -> None:
    """Let one delta or composition act and all others rest; None rests them all. Costs the same however many are attached.

    Raises:
        UnknownName: nothing attached has that name.
        Unsupported: a delta that would have to rest is merged, or the one to act belongs to a composition; nothing is
            changed then.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        if name is not None:
            raise UnknownName(f"Cannot switch to delta `{name}`: nothing is attached to this backbone. Attach or load it first.")
        return
    chosen = None if name is None else ledger.compositions.get(name) or ledger.delta(name)
    others = [acting for term in ledger.terms if (acting := ledger.acting(term)) is not chosen]
    if isinstance(chosen, Delta):
        check_alone(chosen, "switch to")
        check_selects_unmerged(chosen)
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
        if ledger.around.guest is not None:
            ledger.around.guest.refresh()


def recompute(backbone: nn.Module, on: bool = True) -> None:
    """Make the inputs of adapted modules anew in the backward, instead of keeping them from the forward; until the last delta is detached.

        x = f(u)    is not saved where f is a norm, an activation, a product or dropout, and u (or dropout's mask) is kept by f anyway

    Losses and gradients stay the same: equal bits where the function itself runs again, the rounding of one operation for layer norms
    on other devices than a CPU. It saves memory for some time: on BERT-like blocks with LoRA on all linear maps, a third of what is kept.
    Compiled code, gradient checkpointing without re-entry, and modules with hooks of others keep what they kept.

    Args:
        backbone: with at least one delta.
        on: False keeps them again.

    Raises:
        InvalidValue: nothing is attached.

    Example:
        >>> from deltatune.injection.attach import attach, detach
        >>> from deltatune.methods import LoRA
        >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
        >>> delta = attach(mlp, LoRA(rank=2), where=["0", "2"])
        >>> recompute(mlp)
        >>> mlp(torch.ones(1, 8)).sum().backward()
        >>> detach(delta)
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        raise InvalidValue(
            "recompute was asked of a backbone without deltas: there are no inputs of adapted modules. Attach or load first."
        )
    ledger.around.recomputing.is_on = on


@contextmanager
def disabled(backbone: nn.Module) -> Iterator[None]:
    """The plain backbone for a moment: no delta acts, and all act again as before at the end.

    A forward before it can be differentiated behind it, as a loss wants that compares the two; not within it, where the
    parameters are others. Merged deltas stay in the weights: unmerge them first.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        yield
        return
    acting = ledger.acting_deltas
    lent = Lent(ledger, acting)
    ledger.resting += 1
    ledger.arrange(acting)
    lent.begin()
    try:
        yield
    finally:
        lent.end()
        ledger.resting -= 1
        ledger.arrange(ledger.acting_deltas)
        lent.settle()
        for name in ledger.acting_deltas:
            refresh_gradients(ledger.deltas[name])


class Lent:
    """Selected parameters that hold other values for a moment, and behind it the same bits as before: autograd need not know.

    It may have saved them for a backward that comes afterwards; one that comes meanwhile is still refused.
    """

    def __init__(self, ledger: Ledger, deltas: Iterable[str]) -> None:
        entries = [entry for name in deltas for entry in ledger.deltas[name].entries if isinstance(entry.patch, SelectionPatch)]
        whole = {id(entry.parameter): entry.parameter for entry in entries if entry.choice.alone is not None}
        self._lent = [theta for theta in whole.values() if type(theta.data) is Tensor]
        self._before = self._within = self._versions()

    def begin(self) -> None:
        """The moment begins: they hold the other values."""
        self._within = self._versions()

    def end(self) -> None:
        """It ends: what was written by others meanwhile stays known as written."""
        quiet = [now == then for now, then in zip(self._versions(), self._within, strict=True)]
        self._before = [version if still else -1 for version, still in zip(self._before, quiet, strict=True)]

    def settle(self) -> None:
        """They hold the bits of before again."""
        for theta, version in zip(self._lent, self._before, strict=True):
            if version >= 0:
                torch._C._autograd._unsafe_set_version_counter((theta,), (version,))

    def _versions(self) -> list[int]:
        return [theta._version for theta in self._lent]


@contextmanager
def unchanged(backbone: nn.Module, ledger: Ledger) -> Iterator[None]:
    """The backbone's own weights for a moment, without what is selected and what is merged."""
    held = [(kept, kept.parameter.detach().clone()) for kept in ledger.kept]
    known = [kept for kept, _ in held if not kept.was_written]
    with disabled(backbone), torch.no_grad():
        for kept, _ in held:
            kept.parameter.copy_(kept.original)
        try:
            yield
        finally:
            for kept, value in held:
                kept.parameter.copy_(value)
            for kept in known:
                kept.version = kept.parameter._version
