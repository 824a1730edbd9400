"""Watching the forwards of the root: random draws ahead of each, and a check that every patch is reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import Idle
from deltatune.injection.slot import slot_of

if TYPE_CHECKING:
    from deltatune.injection.entries import Entry
    from deltatune.injection.ledger import Ledger


class Watch:
    """The hooks of the root module.

    Args:
        ledger: of the same root; it knows which deltas act.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._unseen: list[Entry] = []
        self._reached: set[str | None] = set()
        self.draws = ledger.around.draws
        self._handles: list[RemovableHandle] = []

    def listen(self, backbone: nn.Module) -> None:
        """Register the hooks."""
        self._handles = [
            backbone.register_forward_pre_hook(self.before, with_kwargs=True),
            backbone.register_forward_hook(self.after),
        ]

    def unlisten(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def add(self, entries: Iterable[Entry], *, allow_idle: bool) -> None:
        """Take in the entries of a new delta; whether all of them are reached is only asked where that is not left open."""
        for entry in entries:
            if entry.act.listens and not allow_idle:
                self._unseen.append(entry)
            self.draws.add(entry.delta, entry.patch)

    def drop(self, delta: str) -> None:
        """Forget the entries of a delta."""
        self._unseen = [entry for entry in self._unseen if entry.delta != delta]
        self.draws.drop(delta)
        if self._ledger.around.guest is not None:
            self._ledger.around.guest.forget(delta)

    def before(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the root: the random draws of this forward; a guest is told of it."""
        guest = self._ledger.around.guest
        if guest is not None and not torch.compiler.is_compiling():
            guest.begin(args, kwargs)
        if backbone.training and self.draws.any:  # else nothing here may depend on which deltas act: compiled code would be bound to it
            self.draws.take(self._ledger.acting_deltas)

    def after(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the root: every patch must sit where the forward comes by.

        Raises:
            Idle: an active patch's host was never called.
        """
        if torch.compiler.is_compiling():
            return
        if backbone.training:
            self.draws.count()
        if not self._unseen:
            return
        acting = set(self._ledger.acting_deltas)
        self._reached |= {entry.site.role for entry in self._unseen if has_fired(entry)}
        self._unseen = [entry for entry in self._unseen if not has_fired(entry)]
        # a training forward may skip layers at random, and a batch may miss an expert kept as a module of its own
        silent = [
            entry
            for entry in self._unseen
            if entry.delta in acting
            and not (backbone.training and entry.site.role is not None and entry.site.role in self._reached)
            and not entry.site.is_expert
        ]
        if silent:
            raise idle(silent[0].delta, [entry for entry in silent if entry.delta == silent[0].delta])


def idle(delta: str, silent: Sequence[Entry]) -> Idle:
    """The error of a delta with patches that no forward reaches."""
    paths = ", ".join(f"`{entry.key}`" for entry in silent[:3])
    return Idle(
        f"Delta `{delta}` acts at {paths}{' and others' if len(silent) > 3 else ''}, but the forward never called "
        f"{'that module' if len(silent) == 1 else 'those modules'}: the delta would do nothing there. Choose other sites "
        "(dt.find_sites lists them), or detach the delta and attach it with allow_idle=True."
    )


def has_fired(entry: Entry) -> bool:
    """The module of a patch has run."""
    slots = [slot_of(host.module) for host in entry.hosts]
    return any(slot is None or slot.has_fired for slot in slots)  # of tied owners, one reader is enough
