"""A plan: what one route does at every module, made once when it opens and never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltatune.injection.slot import Term
from deltatune.multi.lanes import TOKENS, Lanes
from deltatune.multi.own import Own
from deltatune.multi.picks import Picks
from deltatune.multi.table import Table

Program = tuple[Term, ...]
"""What acts in a row, in order: one entry of a route."""


@dataclass(frozen=True)
class Use:
    """One table in use by a route.

    Attributes:
        table: the table.
        lanes: its tensors when the route opened, and the lane of each row.
        own: the deltas' own tensors as lanes, that gradients reach; None where nothing trains.
        compact: the lane of each row among those.
    """

    table: Table
    lanes: Lanes
    own: Own | None = None
    compact: Picks | None = None

    @property
    def is_idle(self) -> bool:
        """No row uses a lane."""
        return not self.lanes.picks.is_used

    def apply(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """The form, for rows with a lane each: x (rows, tokens, in), y (rows, tokens, out); ``out`` is y where it may be overwritten."""
        form = self.table.form
        if self.own is None or self.compact is None or not torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                key = y.dtype, y.size(1) < TOKENS
                if out is not None and (shortcut := self.lanes.shortcuts.get(key)) is not None and x.dtype == y.dtype:
                    shortcut(x, out)
                    return out
                if self.lanes.begin() and key not in self.lanes.shortcuts:
                    self.lanes.shortcuts[key] = form.shortcut(y, self.lanes, self.table)
            return form.many(x, y, self.lanes, self.table, out)
        if self.own.beside is not None and self.compact.is_even:
            return form.beside(x, y, self.own.beside, self.compact, self.table)
        return form.many(x, y, Lanes(self.own(), self.compact), self.table)


@dataclass(frozen=True)
class Step:
    """What the k-th delta of every row does at a module.

    Attributes:
        inputs: tables that edit what the module is given, in the order in which they run.
        outputs: tables that edit what it returns.
    """

    inputs: tuple[Use, ...]
    outputs: tuple[Use, ...]


@dataclass(frozen=True)
class Apart:
    """Rows with one program that no table holds at a module.

    Attributes:
        rows: their numbers, (n,).
        program: what acts in them.
    """

    rows: Tensor
    program: Program


@dataclass(frozen=True)
class Work:
    """What a route does at one module.

    Attributes:
        module: tables of what the module is in each row.
        steps: the deltas of each row, innermost first.
        aparts: rows that are computed by themselves.
        is_edited: some row's input is edited.
    """

    module: tuple[Use, ...] = ()
    steps: tuple[Step, ...] = ()
    aparts: tuple[Apart, ...] = ()
    is_edited: bool = False

    @cached_property
    def only(self) -> Use | None:
        """The one table in use, where it edits the whole output of the module and nothing else is done."""
        uses = [use for step in self.steps for use in step.outputs if not use.is_idle]
        if self.aparts or self.is_edited or len(uses) != 1 or not all(use.is_idle for use in self.module):
            return None
        table = uses[0].table
        plain = table.key.reads == "module" and table.site.rows is None and table.site.channel_axis == -1 and not table.form.whole
        return uses[0] if plain else None

    @property
    def edits(self) -> bool:
        """Inputs are edited; compiled code does it for any route, so that all share one graph."""
        return any(step.inputs for step in self.steps) if torch.compiler.is_compiling() else self.is_edited


@dataclass(frozen=True)
class Plan:
    """What one route does.

    Attributes:
        number: of the route; later ones have higher numbers.
        entries: what each row uses.
        works: number of an act -> what it does.
        contexts: number of a context act -> what the rows do there.
        has_prefixes: some row has one.
        training: the backbone was in training when it was made.
    """

    number: int
    entries: tuple[Program, ...]
    works: Mapping[int, Work] = field(default_factory=dict)
    contexts: Mapping[int, Any] = field(default_factory=dict)
    has_prefixes: bool = False
    training: bool = False

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.entries)

    @cached_property
    def deltas(self) -> tuple[str, ...]:
        """The deltas in it, each once."""
        return names_of(self.entries)


def names_of(programs: Sequence[Program]) -> tuple[str, ...]:
    """The deltas in them, each once."""
    return tuple(dict.fromkeys(name for program in dict.fromkeys(programs) for term in program for name in term.members))


def members_of(program: Program) -> Sequence[str] | None:
    """The deltas of a row that act one behind the other; None where some are weighed against each other."""
    if any(term.how != "sequential" for term in program):
        return None
    return [name for term in program for name in term.members]
