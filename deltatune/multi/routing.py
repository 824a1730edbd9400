"""``route``: a forward in which each row of the batch uses its own delta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.refusals import check_unmerged
from deltatune.injection.slot import Term
from deltatune.injection.switching import disabled
from deltatune.methods.kinds import SelectionPatch
from deltatune.multi.bank import Bank, bank
from deltatune.multi.plan import Plan, Program, names_of
from deltatune.multi.recompute import captured

Named = str | Delta | Composition | None
"""What a row may use: nothing, a delta or a composition."""

Entry = Named | Sequence[Named]
"""The same, or several of them, one behind the other."""


@contextmanager
def route(backbone: nn.Module, entries: Sequence[Entry]) -> Iterator[Plan]:
    """Let row i of every batch within use ``entries[i]``, and nothing else; all other deltas rest.

    Row i is computed as if its entry alone were attached and active, whatever the other rows use, and gradients reach
    the deltas that are enabled and not frozen. A batch may hold each row several times in a row, as ``generate`` does
    for beams and ``num_return_sequences``.

    Args:
        backbone: the model.
        entries: one per row: the name of a delta or composition, a list of them that act one behind the other, or None
            for the plain backbone.

    Raises:
        UnknownName: nothing attached has such a name.
        Unsupported: a delta cannot act in single rows; the message names the reason and what to do.
        InvalidValue: no entries.
        Busy: another thread has a route open on this backbone.

    Example:
        >>> import torch
        >>> from deltatune.injection.attach import attach, detach
        >>> from deltatune.methods import IA3, LoRA
        >>> mlp = nn.Sequential(nn.Linear(4, 3))
        >>> one, two = attach(mlp, LoRA(rank=1), "0", name="one"), attach(mlp, IA3(), "0", name="two")
        >>> with torch.no_grad(), route(mlp, ["one", None, "two", ["one", "two"]]):
        ...     mlp(torch.ones(4, 4)).shape
        torch.Size([4, 3])
    """
    if isinstance(entries, str) or not len(entries):
        raise InvalidValue(f"route was given {entries!r:.80} as its entries. Give a list with one entry per row of the batch.")
    ledger = ledger_of(backbone)
    if ledger is None and all(entry is None for entry in entries):
        with disabled(backbone):
            yield Plan(0, ((),) * len(entries))
        return
    own = bank(backbone)
    own.opened.check_owner()
    programs = [_program(own.ledger, entry) for entry in entries]
    with disabled(backbone), _entered(own, programs) as plan:
        yield plan


@contextmanager
def _entered(own: Bank, programs: Sequence[Program]) -> Iterator[Plan]:
    """The bank with this route open."""
    ledger = own.ledger
    for name in names_of(programs):
        check_unmerged(ledger.deltas[name], "route")
    for name in dict.fromkeys(member for term in ledger.terms for member in term.members):
        if any(isinstance(entry.patch, SelectionPatch) for entry in ledger.deltas[name].entries):
            refresh_gradients(ledger.deltas[name])  # what it selects in place rests
    plan = own.planned(programs)
    try:
        with own.opened.entered(plan), captured(own.layers, own):
            yield plan
    finally:
        own.opened.close(plan)


def _program(ledger: Ledger, entry: Entry) -> Program:
    """What acts in a row, in order."""
    listed = [entry] if entry is None or isinstance(entry, str | Delta | Composition) else list(entry)
    terms = [_term(ledger, one) for one in listed if one is not None]
    names = [name for term in terms for name in term.members]
    if len(set(names)) < len(names):
        raise InvalidValue(f"An entry of a route names a delta twice: {', '.join(names)}. Name each once in a row.")
    return tuple(terms)


def _term(ledger: Ledger, named: str | Delta | Composition) -> Term:
    name = named if isinstance(named, str) else named.name
    if name in ledger.compositions:
        return ledger.compositions[name].term
    delta = ledger.delta(name)
    if isinstance(named, Delta) and named is not delta:
        raise Unsupported(f"Delta `{name}` belongs to another backbone. Route the deltas of this one.")
    return Term("sequential", (name,), (1.0,))
