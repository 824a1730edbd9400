"""How weight patches run: swap the effective parameter in for the length of one forward of its host.

    theta' = g_n(... g_1(theta; phi_1) ...; phi_n)          one delta after the other
    theta' = theta + sum_i w_i (g_i(theta; phi_i) - theta)   side by side

The pre-hook puts theta' into ``owner._parameters[name]`` and the post-hook puts the Parameter back, whatever happens
in between. ``torch.nn.utils.parametrize`` would change the owner's class and cannot be pickled. theta' is computed in
the types of theta and phi even under autocast, so that it does not depend on who asks first.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.draws import Draws
from deltatune.injection.guard import Guard
from deltatune.injection.outputs import put_rows
from deltatune.injection.slot import Act, How, Member, Term
from deltatune.injection.steps import steps
from deltatune.methods.kinds import Patch, Reaching, Stochastic, WeightPatch
from deltatune.structure.index import Index
from deltatune.structure.site import Site, is_packed

if TYPE_CHECKING:
    from deltatune.injection.around import Around


FoldTerm = tuple[How, tuple[tuple[Member, ...], ...], tuple[float, ...]]
"""How the members act together; for each of them its patches on the parameter, in order; and its weight."""


class Fold:
    """All weight patches on one parameter, as one function theta -> theta'."""

    def __init__(self, parameter: str, terms: tuple[FoldTerm, ...]) -> None:
        self.owner_path, _, self.name = parameter.rpartition(".")
        self.terms = terms
        self._patches: list[Patch] = [member.patch for _, groups, _ in terms for group in groups for member in group]
        self._stochastic = [patch for patch in self._patches if isinstance(patch, Stochastic)]
        self._read = [*self._patches, *(patch.shared for patch in self._patches if isinstance(patch, Reaching))]
        self._cache: tuple[tuple[Any, ...], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def owner(self, host: nn.Module) -> nn.Module:
        """The module that holds the parameter, at or below the host."""
        return host.get_submodule(self.owner_path) if self.owner_path else host

    def effective(self, theta: Tensor) -> Tensor:
        """theta', cached while nothing needs gradients, until an optimizer steps or a version counter of theta or phi moves.

        What is written through ``.data`` moves none: see ``refresh``.
        """
        if torch.compiler.is_compiling() or theta.is_inference():
            return self._compute(theta)
        if torch.is_grad_enabled():
            self.drop_cache()
            return self._compute(theta)
        if self.draws_now:
            return self._compute(theta)
        phi = [tensor for module in self._read for tensor in (*module.parameters(), *module.buffers())]
        if any(tensor.is_inference() for tensor in phi):
            return self._compute(theta)
        key = (steps(), *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in (theta, *phi)))
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self._compute(theta))
        return self._cache[1]

    @property
    def draws_now(self) -> bool:
        """A patch draws random numbers in training."""
        return any(patch.training for patch in self._stochastic)

    def drop_cache(self) -> None:
        """Forget the cached theta'."""
        self._cache = None

    def _compute(self, theta: Tensor) -> Tensor:
        with torch.autocast(theta.device.type, enabled=False):
            return self._folded(theta)

    def _folded(self, theta: Tensor) -> Tensor:
        for how, groups, weights in self.terms:
            if how == "sequential":
                for group in groups:
                    theta = _chain(group, theta)
            else:
                theta = theta + torch.stack([w * (_chain(group, theta) - theta) for w, group in zip(weights, groups, strict=True)]).sum(0)
        return theta


def _chain(members: tuple[Member, ...], theta: Tensor) -> Tensor:
    for member in members:
        theta = run_weight(member, theta)
    return theta


def run_weight(member: Member, theta: Tensor) -> Tensor:
    """One weight patch on its rows of theta."""
    rows = member.site.rows
    if rows is None:
        return member.patch(theta)  # type: ignore[no-any-return]
    axis = member.site.rows_axis(theta)
    return put_rows(theta, rows, member.patch(member.site.rows_of(theta, axis)), axis)


class WeightAct(Act):
    """Swaps the effective parameters of one host module.

    Attributes:
        folds: parameter -> what acts on it.
        swapped: owner, name and Parameter of what stands aside now.
    """

    listens = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.guard = Guard()
        self.draws: Draws | None = None
        self.folds: dict[str, Fold] = {}
        self.swapped: list[tuple[nn.Module, str, Tensor]] = []
        self._calls = 0
        self._holder: int | None = None

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse a quantised parameter: what is added to its codes is no weight. One on the meta device may be filled later."""
        assert isinstance(patch, WeightPatch)
        theta = site.module.get_parameter(patch.parameter)
        if not theta.is_meta and is_packed(theta):
            raise Unsupported(
                f"`{site.key}` cannot take a {type(patch).__name__}: its `{patch.parameter}` is quantised ({type(theta.data).__name__}, "
                f"{theta.dtype}). Load the backbone unquantised, or use an output-kind method such as LoRA on its linears."
            )

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Share one guard with the other hosts of the backbone, and its random draws."""
        self.guard, self.draws = around.guard, around.draws

    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """One fold per parameter, over the active deltas that patch it."""
        self._settle()
        found: dict[str, list[FoldTerm]] = {}
        for term in terms:
            for name, entry in self.entries_of(term).items():
                found.setdefault(name, []).append(entry)
        self.folds = {name: Fold(name, tuple(entries)) for name, entries in found.items()}

    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """One more function on each parameter that it patches."""
        self._settle()
        for name, entry in self.entries_of(term).items():
            before = self.folds[name].terms if name in self.folds else ()
            self.folds[name] = Fold(name, (*before, entry))

    def entries_of(self, term: Term) -> dict[str, FoldTerm]:
        """Parameter -> what the term does with it."""
        names = dict.fromkeys(member.parameter for delta in term.members for member in self.members.get(delta, ()))
        return {name: self._entry(term, name) for name in names}

    def _entry(self, term: Term, name: str) -> FoldTerm:
        groups, weights = [], []
        for delta, weight in zip(term.members, term.weights, strict=True):
            members = tuple(member for member in self.members.get(delta, ()) if member.parameter == name)
            if members:
                groups.append(members)
                weights.append(weight)
        if term.mixer is not None:
            raise Unsupported(
                f"A {term.how} composition weighs outputs per token; weight-kind deltas have none. Compose them with how='weighted'."
            )
        return term.how, tuple(groups), tuple(weights)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Swap theta' in; a module that calls itself finds it there.

        Raises:
            Busy: another thread's forward holds swapped weights of this backbone.
            Unsupported: a parameter is not in memory.
        """
        if not self.folds:
            return args, kwargs
        if torch.compiler.is_compiling():
            self._swap(module)
            return args, kwargs
        self.guard.enter()
        if self._calls and not _calls_itself(module):
            self._settle()
        self._holder = threading.get_ident()
        self._calls += 1
        if self._calls == 1:
            if self.draws is not None and any(fold.draws_now for fold in self.folds.values()):
                self.draws.read()
            self._swap(module)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the Parameters back, unless another thread's forward holds them."""
        if torch.compiler.is_compiling():
            self._restore()
        elif self._holder == threading.get_ident():
            self._leave()
        return output

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Forget what was cached of tensors that move now."""
        for fold in self.folds.values():
            fold.drop_cache()

    def _swap(self, module: nn.Module) -> None:
        for fold in self.folds.values():
            owner = fold.owner(module)
            theta = owner._parameters[fold.name]
            if theta is None or theta.is_meta:
                raise Unsupported(
                    f"`{fold.name}` of {type(owner).__name__} is offloaded or on the meta device; a weight-kind delta needs it in memory. "
                    "Load the backbone without offload, or use an output-kind method such as LoRA on its linears."
                )
            self.swapped.append((owner, fold.name, theta))
            owner._parameters[fold.name] = fold.effective(theta)  # type: ignore[assignment]

    def _restore(self) -> None:
        while self.swapped:
            owner, name, theta = self.swapped.pop()
            owner._parameters[name] = theta  # type: ignore[assignment]

    def _leave(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._restore()
            self._holder = None
        self.guard.leave()

    def _settle(self) -> None:
        """End the calls that Ctrl-C broke off in this thread: for what is no ``Exception``, PyTorch runs no post-hooks."""
        while self._calls and self._holder == threading.get_ident():
            self._leave()


def _calls_itself(module: nn.Module) -> bool:
    """Whether the call of ``module`` that is under way was made from within another one."""
    calls = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            calls += 1
        frame = frame.f_back
    return calls > 1
