"""What a route does where virtual tokens join, and where side networks run: there the kernel's own acts stay in charge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.injection.prefix import PrefixAct
from deltatune.injection.prompt import PromptAct
from deltatune.injection.rows import RowPrefixes, RowPrompts
from deltatune.injection.side import RowSide, SideAct
from deltatune.injection.slot import Act, slot_of
from deltatune.multi.plan import Program, names_of
from deltatune.structure.index import Index
from deltatune.structure.site import Site

ContextAct = PrefixAct | PromptAct | SideAct
"""The acts that learn from a bank what each row does."""


def context_at(module: nn.Module, kind: type[Act]) -> ContextAct:
    """The act that runs a context patch at its module."""
    slot = slot_of(module)
    act = slot.acts.get(kind) if slot is not None else None
    assert isinstance(act, PrefixAct | PromptAct | SideAct)
    return act


class ContextPlanner:
    """What every row does at context acts.

    Args:
        rows_of: program -> the rows that use it.
        rows: how many there are.
    """

    def __init__(self, rows_of: Mapping[Program, Sequence[int]], rows: int) -> None:
        self.rows_of, self.rows = rows_of, rows
        self._chosen: dict[tuple[tuple[Program, ...], torch.device], Tensor] = {}

    def plan(self, act: ContextAct, device: torch.device) -> Any:
        """What the rows do there; None where none does anything."""
        programs = [program for program in self.rows_of if any(name in act.members for name in names_of([program]))]
        programs.sort(key=lambda program: [term.members for term in program])  # compiled code is the same in whatever rows they are
        if not programs:
            return None
        make = next(make for kind, make in MAKERS if isinstance(act, kind))
        return make(self, act, programs, device)

    def chosen(self, programs: Sequence[Program], device: torch.device) -> Tensor:
        """Which of the programs each row uses; the number behind the last for none."""
        key = tuple(programs), device
        if key not in self._chosen:
            numbers = [len(programs)] * self.rows
            for number, program in enumerate(programs):
                for row in self.rows_of[program]:
                    numbers[row] = number
            self._chosen[key] = torch.tensor(numbers, device=device)
        return self._chosen[key]


def _prefixes(planner: ContextPlanner, act: ContextAct, programs: Sequence[Program], device: torch.device) -> RowPrefixes:
    assert isinstance(act, PrefixAct)
    deltas = [[name for term in program for name in term.members] for program in programs]
    patches: list[list[Any]] = [[member.patch for name in names for member in act.members.get(name, ())] for names in deltas]
    lengths = [sum(length for name in names for length, _ in act.lengths(name)) for names in deltas]
    ahead = [sum(length * placed for name in names for length, placed in act.lengths(name)) for names in deltas]
    return RowPrefixes(planner.chosen(programs, device), [*patches, []], [*lengths, 0], [*ahead, 0])


def _prompts(planner: ContextPlanner, act: ContextAct, programs: Sequence[Program], device: torch.device) -> RowPrompts:
    assert isinstance(act, PromptAct)
    deltas = [[name for term in program for name in term.members] for program in programs]
    patches: list[list[Any]] = [[member.patch for name in names for member in act.members.get(name, ())] for names in deltas]
    columns = [[seen for name in names for seen in act.columns(name)] for names in deltas]
    return RowPrompts(planner.chosen(programs, device), [*patches, []], [*columns, []])


def _sides(planner: ContextPlanner, act: ContextAct, programs: Sequence[Program], device: torch.device) -> tuple[RowSide, ...]:
    found = []
    for program in programs:
        weighed: list[Any] = [
            (member.patch, weight)
            for term in program
            for name, weight in zip(term.members, term.weights, strict=True)
            for member in act.members.get(name, ())
        ]
        rows = torch.tensor(planner.rows_of[program], device=device)
        found.append(RowSide(rows, planner.rows, tuple(weighed)))
    return tuple(found)


MAKERS: tuple[tuple[type[Act], Callable[..., Any]], ...] = ((PrefixAct, _prefixes), (PromptAct, _prompts), (SideAct, _sides))
"""What each of the acts is told."""


@dataclass(frozen=True)
class Context:
    """A context act of a backbone.

    Attributes:
        act: the act.
        device: where it computes.
        stack: path of the text stack it belongs to; None where it belongs to none.
    """

    act: ContextAct
    device: torch.device
    stack: str | None

    @classmethod
    def of(cls, act: ContextAct, site: Site, index: Index) -> Context:
        """The act at a site."""
        device = next((parameter.device for parameter in site.module.parameters()), torch.device("cpu"))
        stacks = (stack.site.path for stack in index.stacks if any(own.module is site.module for own in (stack.site, *stack.attentions)))
        return cls(act, device, next(stacks, None))


def plan_contexts(contexts: Mapping[int, Context], rows_of: Mapping[Program, Sequence[int]], rows: int) -> dict[int, Any]:
    """What the rows do at every context act."""
    planner = ContextPlanner(rows_of, rows)
    plans = {number: planner.plan(context.act, context.device) for number, context in contexts.items()}
    prompts = {contexts[number].stack: found for number, found in plans.items() if isinstance(found, RowPrompts)}
    for number, found in plans.items():
        act = contexts[number].act
        if isinstance(found, RowPrefixes) and isinstance(act, PrefixAct) and act.relative is not None:
            found.prompts = prompts.get(contexts[number].stack)
    return plans
