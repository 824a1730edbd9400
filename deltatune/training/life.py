"""A method's life in a training loop: prepare, penalty, steps, phases, export. One object for every loop.

A loop of your own calls the same methods that ``DeltaCallback`` calls in a ``transformers.Trainer``:

    life = Life(delta, total_steps)
    life.begin(batches)
    for batch in batches:
        life.before_step()
        loss(backbone, batch).backward()
        life.add_penalty()
        optimizer.step()
        life.after_step()
        optimizer.zero_grad()
    life.finish()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import InvalidValue
from deltatune.injection.compose import Composition, Mixing
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import Exported, Penalised, Phased, Prepared, Stepping

Trained = Delta | Mixing
"""What a loop may train: a delta, or what a composition trains besides its members (gates, a fusion)."""

Given = Delta | Composition | Mixing
"""What a loop may be given: a composition stands for its members that are not frozen, and its mixers."""


class Life:
    """Calls what the methods of some deltas declare, each at its moment and each phase once.

    Attributes:
        deltas: those that train together.
        mixing: what compositions train with them.
        total: optimiser steps of the whole run.
        step: optimiser steps taken so far.
    """

    def __init__(self, trained: Given | Sequence[Given], total: int) -> None:
        if total < 1:
            raise InvalidValue(f"A run of {total} steps was asked for; it takes at least one.")
        parts = parts_of(trained)
        self.deltas = deltas_of(parts)
        self.mixing = [part for part in parts if isinstance(part, Mixing)]
        self.total = total
        self.step = 0
        self._penalised = [(delta, delta.method) for delta in self.deltas if isinstance(delta.method, Penalised)]
        self._stepping = [(delta, delta.method) for delta in self.deltas if isinstance(delta.method, Stepping)]
        self._phased = [(delta, delta.method) for delta in self.deltas if isinstance(delta.method, Phased)]
        self._starts = {delta.name: phase_starts(delta, total) for delta in self.deltas}
        self._entered = dict.fromkeys(self._starts, 0)

    @property
    def phases(self) -> int:
        """How many phases were entered so far, of all deltas."""
        return sum(self._entered.values())

    def begin(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the methods look at data, before the first step; ``batches`` hold labels and lie on the backbone's device."""
        for delta in self.deltas:
            if isinstance(delta.method, Prepared):
                patches = {entry.key: entry.patch for entry in delta.entries if not entry.head}
                delta.method.prepare(patches, delta.backbone, batches)

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps of an earlier process: enter the phases it had entered, then load the deltas' states.

        Call it on freshly attached deltas, ahead of ``load_state_dict``: what a phase sets beside tensors is set again,
        and the tensors are then overwritten.
        """
        self.step = step
        self._enter_until(step - 1)

    def before_step(self) -> None:
        """Enter the phases that begin here; call it ahead of a step's first forward."""
        self._enter_until(self.step)

    def add_penalty(self) -> None:
        """Add the gradients of the methods' own loss terms, once an optimiser step, behind the last backward."""
        for delta, method in self._penalised:
            _add_gradients(method.penalty(list(_patches(delta))), delta)
        for mixing in self.mixing:
            _add_gradients(mixing.penalty(), mixing)

    def after_step(self) -> None:
        """Count the step and let the methods act on it; gradients must still be there."""
        self.step += 1
        for delta, method in self._stepping:
            method.after_step(list(_patches(delta)), self.step, self.total)

    def finish(self) -> None:
        """Enter what phases are left, and bring each delta into its final form."""
        self._enter_until(self.total)
        for delta in self.deltas:
            if isinstance(delta.method, Exported):
                patches = list(_patches(delta))
                if not delta.method.is_exported(patches):
                    delta.method.export(patches, delta.shared)

    def _enter_until(self, step: int) -> None:
        for delta, method in self._phased:
            starts = self._starts[delta.name]
            while self._entered[delta.name] < len(starts) and starts[self._entered[delta.name]] <= step:
                phase = method.phases[self._entered[delta.name]]
                method.enter(list(_patches(delta)), phase.name)
                self._entered[delta.name] += 1


def parts_of(given: Given | Sequence[Given]) -> list[Trained]:
    """What trains, each once."""
    found: list[Trained] = []
    for part in [given] if isinstance(given, Given) else given:
        if not isinstance(part, Composition):
            found.append(part)
            continue
        found += [delta for delta in part.deltas if delta.trainable and delta not in found]
        found += [part.mixing] if part.mixers() else []
    return found


def deltas_of(trained: Sequence[Trained]) -> list[Delta]:
    """The deltas among what trains."""
    return [part for part in trained if isinstance(part, Delta)]


def phase_starts(delta: Delta, total: int) -> list[int]:
    """The step ahead of which each phase of the delta's method begins."""
    if not isinstance(delta.method, Phased):
        return []
    shares = [phase.share for phase in delta.method.phases]
    return [round(total * share) for share in accumulate([0.0, *shares[:-1]])]


def _patches(delta: Delta) -> Iterator[Any]:
    """The patches the method built: those of a task head are not its own."""
    return (entry.patch for entry in delta.entries if not entry.head)


def _add_gradients(penalty: Tensor, trained: Trained) -> None:
    if not penalty.requires_grad:  # a phase without the term
        return
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    # not penalty.backward(): that would fire DDP's gradient hooks a second time
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
