"""The loop: rows with one program at one module, computed as if they were the whole batch.

It is the definition of what a route computes, and runs what no table can hold: patches that are no data, weights of
their own, members of a composition that weigh each other. What acts there is what acts without a route.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.outputs import EDIT_INPUT, Group, OutputAct, Step, first_output
from deltatune.injection.selections import SelectionAct, selected
from deltatune.injection.slot import Slot, first_input, replace_input, slot_of
from deltatune.injection.weights import Fold, FoldTerm, WeightAct
from deltatune.methods.kinds import BranchInputPatch, BranchPatch, TokenPatch
from deltatune.multi.forms.affine import widened

if TYPE_CHECKING:
    from deltatune.multi.act import RouteAct
    from deltatune.multi.plan import Apart, Program


ONCE = {"attn_mask": 2, "src_mask": 2, "tgt_mask": 2, "memory_mask": 2, "mask": 2}
"""Arguments of PyTorch's attentions that, with so many axes, are there once for all rows; (tokens, tokens) may look like rows."""


@dataclass
class Kept:
    """What one call of a module keeps between its hooks.

    Attributes:
        args: the call as the caller made it.
        kwargs: the same.
        seen: what each step saw, where an input is edited.
        ranks: where in its row each token stands, where a patch asks.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seen: list[Tensor] = field(default_factory=list)
    ranks: Tensor | None = None


def run_apart(act: RouteAct, module: nn.Module, apart: Apart, kept: Kept, plain: Tensor, y: Tensor) -> Tensor:
    """y with these rows computed by themselves.

    Args:
        act: of the module.
        module: the module.
        apart: the rows, and what acts in them.
        kept: the module's call.
        plain: what the module returned.
        y: the output so far, other rows edited.
    """
    slot = slot_of(module)
    assert slot is not None
    if plain.shape[0] == 1 < act.opened.rows:  # computed once for all rows, as positions are
        kept = _spread(kept, act.opened.rows)
        plain = plain.expand(act.opened.rows, *plain.shape[1:])
        y = plain if y.shape[0] == 1 else y
    factor = plain.shape[0] // act.opened.rows
    rows = (apart.rows[:, None] * factor + torch.arange(factor, device=apart.rows.device)).flatten() if factor > 1 else apart.rows
    size = plain.shape[0]
    once = ONCE if type(module).__module__.startswith("torch.nn.") else {}

    def own(name: str, value: Any) -> Any:
        return value if isinstance(value, Tensor) and once.get(name) == value.ndim else _chosen(value, rows, size)

    args = tuple(own(act.names[k] if k < len(act.names) else "", value) for k, value in enumerate(kept.args))
    kwargs = {name: own(name, value) for name, value in kept.kwargs.items()}
    with _told(slot, act, apart.program, kept, rows):
        z = _compute(module, slot, apart.program, args, kwargs, plain.index_select(0, rows), act.names)
    if act.tables.own and z.shape[-1] < y.shape[-1]:  # other rows have heads with more labels
        z = widened(z, y.shape[-1])
    if z.shape[-1] != y.shape[-1]:
        raise Unsupported(f"Rows of a route were given outputs of other widths by {type(module).__name__}, and it cannot widen the others.")
    return y.index_copy(0, rows, z.to(y.dtype))


def _compute(
    module: nn.Module, slot: Slot, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], plain: Tensor, names: Sequence[str]
) -> Tensor:
    """What the module returns for these rows."""
    steps, changed = _steps(slot, program), _weights(slot, module, program)
    edits = any(isinstance(member.patch, EDIT_INPUT) for step in steps for member in _flat(step))

    def inner(k: int, x: Tensor) -> Tensor:
        seen = []
        for step in reversed(steps[:k]):
            seen.append(x)
            x = step.edit(x)
        call_args, call_kwargs = replace_input(args, kwargs, names, x)
        if changed or edits:
            with _held(module, changed):
                y = first_output(module.forward(*call_args, **call_kwargs))
        else:
            y = plain
        for j, step in enumerate(steps[:k]):
            y = step.apply(seen[k - 1 - j], y, lambda x, j=j: inner(j, x))  # type: ignore[misc]
        return y

    return inner(len(steps), first_input(args, kwargs, names))


def _steps(slot: Slot, program: Program) -> list[Step]:
    act = slot.acts.get(OutputAct)
    if not isinstance(act, OutputAct):
        return []
    return [step for term in program for step in act.steps_of(term, slot.mixers)]


def _weights(slot: Slot, module: nn.Module, program: Program) -> dict[str, Tensor]:
    """Parameter -> its value in these rows, selections first."""
    changed: dict[str, Tensor] = {}
    selections, weights = slot.acts.get(SelectionAct), slot.acts.get(WeightAct)
    if isinstance(selections, SelectionAct):
        changed |= _selected(selections, module, program)
    if isinstance(weights, WeightAct):
        found: dict[str, list[FoldTerm]] = {}
        for term in program:
            for name, entry in weights.entries_of(term).items():
                found.setdefault(name, []).append(entry)
        for name, entries in found.items():
            theta = changed.get(name)
            changed[name] = Fold(name, tuple(entries)).effective(module.get_parameter(name) if theta is None else theta)
    return changed


def _selected(act: SelectionAct, module: nn.Module, program: Program) -> dict[str, Tensor]:
    changed: dict[str, Tensor] = {}
    for term in program:
        for delta, weight in zip(term.members, term.weights, strict=True):
            for member in act.members.get(delta, ()):
                name, choice = member.parameter, act.choices[member.parameter]
                value = choice.value(delta, module.get_parameter(name))
                before = changed.get(name, choice.original)
                alone = selected(member).by_value or (weight == 1.0 and before is choice.original)
                changed[name] = value if alone else before + weight * (value - choice.original)
    return changed


@contextmanager
def _held(module: nn.Module, changed: dict[str, Tensor]) -> Iterator[None]:
    """The module with other parameters for a moment."""
    own: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for path, tensor in changed.items():
            owner_path, _, name = path.rpartition(".")
            owner = module.get_submodule(owner_path)
            own.append((owner, name, owner._parameters[name]))
            owner._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in reversed(own):
            owner._parameters[name] = parameter  # type: ignore[assignment]


@contextmanager
def _told(slot: Slot, act: RouteAct, program: Program, kept: Kept, rows: Tensor) -> Iterator[None]:
    """Patches that read what a sub-layer was given, or where tokens stand, are told it for these rows."""
    outputs = slot.acts.get(OutputAct)
    names = [name for term in program for name in term.members]
    members = [member for name in names for member in outputs.members.get(name, ())] if outputs is not None else []
    givens = []
    for member in members:
        if member.given is None:
            continue
        if isinstance(member.patch, TokenPatch):
            assert kept.ranks is not None
            member.given.keep(kept.ranks.index_select(1, rows))
        elif isinstance(member.patch, BranchPatch | BranchInputPatch):
            assert act.given is not None
            member.given.keep(act.given.read().index_select(0, rows))
        givens.append(member.given)
    try:
        yield
    finally:
        for given in givens:
            given.drop()


def _spread(kept: Kept, rows: int) -> Kept:
    """The call as it would be for each row."""

    def wide(value: Any) -> Any:
        return value.expand(rows, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1 else value

    return Kept(tuple(map(wide, kept.args)), {name: wide(value) for name, value in kept.kwargs.items()}, kept.seen, kept.ranks)


def _chosen(value: Any, rows: Tensor, size: int) -> Any:
    """These rows of a tensor that has them; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
        return value.index_select(0, rows)
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        return tuple(_chosen(item, rows, size) for item in value)
    return value


def _flat(step: Step) -> list[Any]:
    if isinstance(step, Group):
        return [member for group in step.members for member in group]
    return list(step.members)
