"""How output and input patches run: a chain of steps around one module's forward.

With steps 1..n on a module f, step k turns the map g_{k-1} into g_k and g_0 = f, so the last step is the outermost:
an input patch of step k edits what steps 1..k-1 and f see, an output patch of step k sees the input of step k.

    one delta            g_k(x) = F_k(g_{k-1}, x)
    parallel, weighted   g_k(x) = y + sum_i w_i (F_i(g_{k-1}, x) - y),   y = g_{k-1}(x)
    gated, fusion        y mixed with the changes F_i(g_{k-1}, x) - y by a trained layer, token by token (``injection.mixers``)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection import lean
from deltatune.injection.branches import Given
from deltatune.injection.draws import Draws
from deltatune.injection.fused import Sharing
from deltatune.injection.mixers import Mixer
from deltatune.injection.slot import Act, Member, Term, first_input, replace_input, slot_of, thread_key
from deltatune.methods.kinds import BranchInputPatch, BranchPatch, InputPatch, OutputPatch, Patch, Stochastic
from deltatune.structure.index import Index
from deltatune.structure.site import Rows, Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around

Inner = Callable[[Tensor], Tensor]
EDIT_INPUT = (InputPatch, BranchInputPatch)


@dataclass(frozen=True)
class Single:
    """A step that is one delta's patches on the module, chained."""

    members: tuple[Member, ...]

    def edit(self, x: Tensor) -> Tensor:
        """What the inner steps see."""
        for member in reversed(self.members):
            x = run_input(member, x)
        return x

    def apply(self, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        """g_k(x), given y = g_{k-1} of the edited x."""
        for member in self.members:
            if isinstance(member.patch, OutputPatch):
                y = run_output(member, x, y)
        return y


@dataclass(frozen=True)
class Group:
    """A step in which several deltas act side by side."""

    members: tuple[tuple[Member, ...], ...]
    weights: tuple[float, ...]
    mixer: Mixer | None

    def edit(self, x: Tensor) -> Tensor:
        """Side by side, every member sees the same input, so the inner steps see it unedited."""
        return x

    def apply(self, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        """y + sum_i w_i z_i, or what the mixer makes of y and the changes z_i = F_i(g_{k-1}, x) - y."""
        changes = []
        for members in self.members:
            step = Single(members)
            edits_input = any(isinstance(member.patch, EDIT_INPUT) for member in members)
            start = inner(step.edit(x)) if edits_input else y
            changes.append(step.apply(x, start, inner) - y)
        if self.mixer is not None:
            return self.mixer(y, changes)  # type: ignore[no-any-return]
        for weight, change in zip(self.weights, changes, strict=True):
            y = y + change * weight
        return y


Step = Single | Group


class OutputAct(Act):
    """Runs the output and input patches of one module."""

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.steps: tuple[Step, ...] = ()
        self._edits_input = False
        self._reads_input = False
        self._seen: dict[int, list[Tensor]] = {}
        self._givens: tuple[Given, ...] = ()
        self._stochastic: tuple[Patch, ...] = ()
        self._draws: Draws | None = None
        self._lean: lean.Lean | None = None
        self._kept: dict[int, tuple[Tensor, Tensor] | Tensor] = {}
        self._sharing = Sharing()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse what is no module's own: a part of a fused projection has no input of its own, and a parameter neither input nor output.

        But an attention returns what its output projection returns. A branch needs a beginning.
        """
        if isinstance(patch, BranchPatch | BranchInputPatch):
            index.beginning(site)
        if site.rows is not None and isinstance(patch, EDIT_INPUT):
            raise Unsupported(
                f"{type(patch).__name__} cannot sit at `{site.key}`: the roles of a fused projection share one input, so the others would "
                f"see it edited, too. Choose `{site.path}`, or a method that edits outputs or weights."
            )
        if site.parameter is not None and (isinstance(patch, EDIT_INPUT) or site.leaf != "output"):
            raise Unsupported(
                f"{type(patch).__name__} cannot sit at `{site.key}`: {type(site.module).__name__} reads this parameter itself, so there is "
                "no module whose input or output it could edit. Use a method that changes weights there, such as LoRA or DiffPruning."
            )

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Learn where random draws are reckoned, and who is given the same."""
        self._draws = around.draws
        self._sharing.others = index.companions(site)

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Order the steps; members of merged or disabled deltas are in no term."""
        self.steps, self._edits_input, self._reads_input, self._givens, self._stochastic = (), False, False, (), ()
        self._lean = None
        for term in terms:
            self.append(module, term, mixers)

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """One more step, the outermost; one for each delta of a sequential composition."""
        for step in self.steps_of(term, mixers):
            self.steps = (*self.steps, step)
            patches = [member.patch for member in _flat(step)]
            self._givens += tuple(member.given for member in _flat(step) if member.given is not None)
            self._stochastic += tuple(patch for patch in patches if isinstance(patch, Stochastic))
            self._edits_input |= any(isinstance(patch, EDIT_INPUT) for patch in patches)
            self._reads_input |= isinstance(step, Group) or any(isinstance(patch, OutputPatch) for patch in patches)
        members = _flat(self.steps[0]) if len(self.steps) == 1 and isinstance(self.steps[0], Single) else ()
        self._lean = lean.Lean.of(module, members[0]) if len(members) == 1 else None

    def steps_of(self, term: Term, mixers: nn.ModuleDict) -> Sequence[Step]:
        """The steps that a term stands for here."""
        present = [(name, weight) for name, weight in zip(term.members, term.weights, strict=True) if name in self.members]
        groups = tuple(tuple(self.members[name]) for name, _ in present)
        if term.how == "sequential" or not present:
            return [Single(group) for group in groups]
        mixer = mixers[term.mixer] if term.mixer is not None and term.mixer in mixers else None
        return [Group(groups, tuple(weight for _, weight in present), mixer)]  # type: ignore[arg-type]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Edit the input, outermost step first; keep what each step saw where an output patch reads it."""
        if self._draws is not None and not torch.compiler.is_compiling() and any(patch.training for patch in self._stochastic):
            self._draws.read()
        if self._lean is not None:
            return self._leanly(self._lean, module, args, kwargs)
        if not self._edits_input:
            return args, kwargs
        x = first_input(args, kwargs, self.names)
        seen = []
        for step in reversed(self.steps):
            seen.append(x)
            x = step.edit(x)
        if self._reads_input:
            self._seen[thread_key()] = seen[::-1]
        return replace_input(args, kwargs, self.names, x)

    def _leanly(
        self, way: lean.Lean, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs, self.names)
        if lean.is_special(x):
            return args, kwargs
        y = self._sharing.output(way, module, x, partner)
        if y is not None:
            self._kept[thread_key()] = y
            return replace_input(args, kwargs, self.names, x.new_empty(0, x.shape[-1]))
        given, kept = lean.before(way, module, x)
        if kept is None:
            return args, kwargs
        self._kept[thread_key()] = kept
        return (args, kwargs) if given is x else replace_input(args, kwargs, self.names, given)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Edit the output, innermost step first; let go of what the sub-layer was given."""
        try:
            return self._edited(module, args, kwargs, output)
        finally:
            for given in self._givens:
                given.drop()

    def _edited(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        kept = self._kept.pop(thread_key(), None) if self._kept else None
        if kept is not None and output is not None:
            return kept if isinstance(kept, Tensor) else lean.after(output, kept)
        seen = self._seen.pop(thread_key(), None) if self._edits_input else None
        if output is None or not self._reads_input:
            return output
        if seen is None:
            seen = [first_input(args, kwargs, self.names)] * len(self.steps)
        y = first_output(output)
        for k, step in enumerate(self.steps):
            y = step.apply(seen[k], y, lambda x, k=k: self._inner(module, args, kwargs, k, x))  # type: ignore[misc]
        return replace_output(output, y)

    def _inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], k: int, x: Tensor) -> Tensor:
        """g_k(x): the module with its first k steps, run again without its hooks."""
        seen = []
        for step in reversed(self.steps[:k]):
            seen.append(x)
            x = step.edit(x)
        args, kwargs = replace_input(args, kwargs, self.names, x)
        y = first_output(module.forward(*args, **kwargs))
        for j, step in enumerate(self.steps[:k]):
            y = step.apply(seen[k - 1 - j], y, lambda x, j=j: self._inner(module, args, kwargs, j, x))  # type: ignore[misc]
        return y


def partner(module: nn.Module) -> tuple[lean.Lean, Sharing] | None:
    """What acts leanly on another module, and its share in common work; None where that is more or less than one low-rank change."""
    slot = slot_of(module)
    act = None if slot is None else slot.acts.get(OutputAct)
    return (act._lean, act._sharing) if isinstance(act, OutputAct) and act._lean is not None and not act._stochastic else None


def run_input(member: Member, x: Tensor) -> Tensor:
    """One input patch; x as it is for a patch of another kind."""
    if isinstance(member.patch, BranchInputPatch):
        assert member.given is not None
        return member.patch(member.given.read(), x)  # type: ignore[no-any-return]
    return member.patch(x) if isinstance(member.patch, InputPatch) else x


def run_output(member: Member, x: Tensor, y: Tensor) -> Tensor:
    """One output patch on its rows, with the channels of a convolution moved last."""
    if member.given is not None:
        x = member.given.read()
    axis = member.site.channel_axis
    if axis != -1:
        y = y.movedim(axis, -1)
    rows = member.site.rows
    y = member.patch(x, y) if rows is None else put_rows(y, rows, member.patch(x, member.site.rows_of(y, -1)))
    return y if axis == -1 else y.movedim(-1, axis)


def put_rows(y: Tensor, rows: Rows, part: Tensor, axis: int = -1) -> Tensor:
    """y with that part replaced, differentiable in both."""
    if isinstance(rows, slice):
        return torch.slice_scatter(y, part, axis, rows.start, rows.stop)
    return y.index_copy(axis, rows.to(y.device), part)


def first_output(output: Any) -> Tensor:
    """The tensor a module returns, or the first of its tuple."""
    if isinstance(output, Tensor):
        return output
    return output[0]  # type: ignore[no-any-return]


def replace_output(output: Any, y: Tensor) -> Any:
    """The same output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, tuple):
        rest = (y, *output[1:])
        return rest if type(output) is tuple else type(output)(*rest)
    if isinstance(output, list):
        return [y, *output[1:]]
    new = dict(output)  # transformers' ModelOutput
    new[next(iter(new))] = y
    return type(output)(**new)


def _flat(step: Step) -> tuple[Member, ...]:
    return step.members if isinstance(step, Single) else tuple(member for group in step.members for member in group)
