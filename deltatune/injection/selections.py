"""How selection patches act: the backbone's own Parameter trains in place.

    theta = theta_0 + sum_i w_i (theta_i - theta_0)

over the active deltas i that select the parameter. The object stays the same, so optimizers, tied weights and FSDP see
nothing new. theta_0 is kept as a plain tensor that follows the slot through ``to``. One selection per parameter is
*live*, the last active one that is not frozen and whose weight is not 0: it trains, the others stay constant differences. A delta that was
not trained meanwhile gets back its exact bits, and so does the backbone. Of a fresh task head, whose theta_0 is
random, the last active value stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.sharding import as_held
from deltatune.injection.slot import Act, Member, Term
from deltatune.methods.kinds import Patch, SelectionPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site, is_packed


class Choice:
    """The deltas that select one parameter.

    Attributes:
        original: theta_0.
        values: theta_i as it was when what acts was last arranged; what the live one has learnt since is in the Parameter,
            and one that is alone with weight 1 is there as a whole.
        gradients: what the Parameter's ``grad`` was when a delta, or the plain backbone (None), ceased to be live.
        active: the active deltas with their weights, in order.
        frozen: the deltas that do not train.
    """

    def __init__(self, theta: nn.Parameter) -> None:
        self.original = theta.detach().clone()
        self.gradients: dict[str | None, Tensor | None] = {}
        self.values: dict[str, Tensor] = {}
        self.active: tuple[tuple[str, float], ...] = ()
        self.frozen: frozenset[str] = frozenset()

    @property
    def live(self) -> str | None:
        """The delta that trains."""
        return next((delta for delta, weight in reversed(self.active) if weight and delta not in self.frozen), None)

    @property
    def alone(self) -> str | None:
        """The delta whose value the Parameter is, as a whole."""
        return self.active[0][0] if len(self.active) == 1 and self.active[0][1] == 1.0 else None

    def value(self, delta: str, theta: Tensor) -> Tensor:
        """theta_i as it stands now."""
        if delta == self.alone:
            return theta.detach()
        if delta != self.live:
            return self.values[delta]
        learnt = theta.detach() - self._sum(self.active, theta)
        return as_held(self.values[delta], theta) + learnt / dict(self.active)[delta]

    def assign(self, delta: str, value: Tensor, theta: Tensor) -> None:
        """Set theta_i, and the Parameter with it if the delta is active."""
        active = self._read(theta)
        self.values[delta] = value.detach().clone().to(self.original.device, self.original.dtype)
        self._write(active, theta)

    def arrange(self, active: tuple[tuple[str, float], ...], theta: Tensor) -> None:
        """Make exactly these deltas act."""
        if active == self.active:
            return
        before = self.live
        self._read(theta)
        self._write(active, theta)
        self._hand_over(before, theta)

    def freeze(self, delta: str, frozen: bool, theta: Tensor) -> None:
        """Let a delta train or not; what acts stays as it is."""
        after = self.frozen | {delta} if frozen else self.frozen - {delta}
        if self.alone is None and delta in dict(self.active) and after != self.frozen:
            before, active = self.live, self._read(theta)
            self.frozen = after
            self._write(active, theta)
            self._hand_over(before, theta)
        self.frozen = after

    def _hand_over(self, before: str | None, theta: Tensor) -> None:
        """A gradient belongs to the delta that was live, whatever acts for a moment."""
        if self.live != before:
            self.gradients[before] = theta.grad
            gradient = self.gradients.pop(self.live, None)
            theta.grad = None if gradient is None else as_held(gradient, theta)

    def make_original(self, delta: str, theta: Tensor) -> None:
        """theta_0 <- theta_0 + (theta_i - theta_0): the change of one delta becomes the backbone's own, for good."""
        active = self._read(theta)
        value = self.values.pop(delta)
        self.move(value)
        self.values[delta] = value
        self._write(active, theta)

    def move(self, original: Tensor) -> None:
        """theta_0 <- ``original``; what each delta changes stays."""
        original = as_held(original, self.original)
        change = original - self.original
        self.values = {delta: value + as_held(change, value) for delta, value in self.values.items()}
        self.original = original.clone()

    def _read(self, theta: Tensor) -> tuple[tuple[str, float], ...]:
        """Take what the live delta has learnt into its value; returns what was active, and nothing is from now on."""
        holder = self.alone or self.live
        if holder is not None:
            self.values[holder] = self.value(holder, theta).clone()
        active, self.active = self.active, ()
        return active

    @torch.no_grad()
    def _write(self, active: tuple[tuple[str, float], ...], theta: Tensor) -> None:
        theta.copy_(self._sum(active, theta))
        self.active = active
        if self.alone is not None:
            del self.values[self.alone]

    def _sum(self, active: tuple[tuple[str, float], ...], theta: Tensor) -> Tensor:
        """The sum over what is active, in the form in which the Parameter is held."""
        if len(active) == 1 and active[0][1] == 1.0:
            return as_held(self.values[active[0][0]], theta)
        original = as_held(self.original, theta)
        total = original.clone()
        for delta, weight in active:
            total += weight * (as_held(self.values[delta], theta) - original)
        return total

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follow ``nn.Module._apply``."""
        self.original = function(self.original)
        self.values = {delta: function(value) for delta, value in self.values.items()}
        self.gradients = {delta: None if grad is None else function(grad) for delta, grad in self.gradients.items()}


class SelectionAct(Act):
    """The selected parameters of one module; nothing runs in the forward."""

    listens = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.choices: dict[str, Choice] = {}
        self._terms: tuple[Term, ...] = ()

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse a part of a fused projection: its Parameter trains as a whole, the other roles' rows included."""
        if site.rows is not None:
            raise Unsupported(
                f"`{site.key}` cannot train in place: it is a part of `{site.path}`, and a Parameter trains as a whole. "
                f"Choose `{site.path}`, or a method that changes the rows of one role, such as LoRA."
            )

    def add(self, module: nn.Module, member: Member) -> None:
        """Keep theta_0 at the first selection of a parameter."""
        name = member.parameter
        theta = module.get_parameter(name)
        if theta.is_meta or is_packed(theta):
            found = "offloaded" if theta.is_meta else f"quantised ({type(theta.data).__name__}, {theta.dtype})"
            raise Unsupported(
                f"`{member.site.path}` cannot train in place: its `{name}` is {found}. "
                "Load the backbone in memory and unquantised, or use an output-kind method such as LoRA."
            )
        super().add(module, member)
        choice = self.choices.setdefault(name, Choice(theta))
        choice.values[member.delta] = (theta.detach() if selected(member).by_value else choice.original).clone()

    def remove(self, module: nn.Module, delta: str) -> None:
        """Give the parameter back; the delta is inactive by now."""
        for member in self.members.get(delta, ()):
            choice = self.choices[member.parameter]
            choice.values.pop(delta, None)
            choice.gradients.pop(delta, None)
            choice.frozen -= {delta}
            if not choice.values and not choice.active:
                del self.choices[member.parameter]
        super().remove(module, delta)

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Write the sum over the active deltas into each parameter.

        Raises:
            Unsupported: a composition of selections that trains how much of each acts.
        """
        self._terms = tuple(terms)
        for name, choice in self.choices.items():
            acting = [
                (term, member, weight)
                for term in terms
                for delta, weight in zip(term.members, term.weights, strict=True)
                for member in self.members.get(delta, ())
                if member.parameter == name
            ]
            active = [(member.delta, weight) for _, member, weight in acting]
            if any(selected(member).by_value for _, member, _ in acting):
                active = [(active[-1][0], 1.0)]
            elif how := next((term.how for term, _, _ in acting if term.mixer is not None), None):
                raise Unsupported(f"A {how} composition weighs outputs per token; selections have none. Compose them with how='weighted'.")
            choice.arrange(tuple(active), module.get_parameter(name))

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Write the sum anew: its last bits depend on every term."""
        self.arrange(module, (*self._terms, term), mixers)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Nothing to do: the Parameter holds the value."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Nothing to do."""
        return output

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move what is kept beside the Parameters."""
        for choice in self.choices.values():
            choice.apply(function)


def selected(member: Member) -> SelectionPatch:
    """The member's patch."""
    assert isinstance(member.patch, SelectionPatch)
    return member.patch
