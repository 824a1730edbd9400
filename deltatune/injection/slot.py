"""The slot: the one object on a site that holds its patches and runs them.

A slot is a child module of its site, named ``deltatune``. Its hooks are its own bound methods, so a deep copy or a
pickle of the backbone carries them; they are registered when the site gets its first patch and removed with its last.
Everything between (enable, disable, switch, merge, compose, route) only changes the state of the slot's *acts*, one
per way of acting, because ``torch.compile`` ignores hooks added after its first call.
"""

from __future__ import annotations

import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.kinds import Patch
from deltatune.structure.index import Index
from deltatune.structure.site import Site

if TYPE_CHECKING:
    from deltatune.injection.around import Around
    from deltatune.injection.branches import Given
    from deltatune.injection.recompute import Keeper

How = Literal["sequential", "parallel", "weighted", "gated", "fusion"]
CHILD = "deltatune"


@dataclass(frozen=True)
class Term:
    """One entry of the backbone's active list: a delta alone, or a composition of several.

    Attributes:
        how: ``sequential`` chains the members; the others add what each changes, weighed by numbers or by a trained mixer.
        members: names of deltas, in order.
        weights: one per member.
        mixer: name of the composition whose mixers weigh the members; None where nothing is trained for that.
    """

    how: How
    members: tuple[str, ...]
    weights: tuple[float, ...] = ()
    mixer: str | None = None


@dataclass
class Member:
    """One patch of one delta on the slot's module.

    Attributes:
        delta: name of the delta.
        site: of the patch.
        patch: what runs.
        parameter: path of the parameter, of the weight and selection kinds.
        given: what the sub-layer was given, of a branch.
    """

    delta: str
    site: Site
    patch: Patch
    parameter: str = ""
    given: Given | None = None


class Act(ABC):
    """One way of acting on one module: the members of that kind, and how they run in its forward.

    Class attributes:
        listens: it runs in the module's forward, so the slot needs its hooks.

    Attributes:
        members: the patches, under their delta's name.
        names: what the module's forward takes, in order.
    """

    listens: ClassVar[bool]

    def __init__(self, module: nn.Module) -> None:
        self.members: dict[str, list[Member]] = {}
        self.names = input_names(type(module))

    @classmethod
    def check(cls, index: Index, site: Site, patch: Patch) -> None:
        """Refuse a patch that could not act at ``site``, before anything is touched.

        Raises:
            Unsupported: it would never run, or run on something else.
        """

    def join(self, around: Around, backbone: nn.Module, index: Index, site: Site) -> None:
        """Called once, when the act has its first member.

        Args:
            around: what acts keep once per backbone, under names of their own.
            backbone: the root.
            index: its sites.
            site: the first member's.
        """

    def leave(self, around: Around) -> None:
        """Called once, when the act has lost its last member."""

    def add(self, module: nn.Module, member: Member) -> None:
        """Take in a patch; it acts once ``arrange`` names its delta."""
        self.members.setdefault(member.delta, []).append(member)

    def remove(self, module: nn.Module, delta: str) -> None:
        """Forget the patches of one delta."""
        self.members.pop(delta, None)

    @abstractmethod
    def arrange(self, module: nn.Module, terms: Sequence[Term], mixers: nn.ModuleDict) -> None:
        """Set what acts from now on, and in which order."""

    @abstractmethod
    def append(self, module: nn.Module, term: Term, mixers: nn.ModuleDict) -> None:
        """Let one more term act, behind what acts already: at the same cost however much that is."""

    @abstractmethod
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run ahead of the module's forward."""

    @abstractmethod
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run behind it; ``output`` is None when the forward raised."""

    def apply(self, function: Any) -> None:
        """Move the tensors that are neither parameters nor buffers, as ``nn.Module._apply`` moves those."""


class Slot(nn.Module):
    """Holds and runs the patches of one module.

    Attributes:
        patches: every patch, under ``<delta>`` or ``<delta>/<leaf>`` where a fused projection has several.
        mixers: what compositions train here to weigh their members, under the composition's name.
        acts: one act per way of acting in use, in the order they run before the forward.
        has_fired: the module has run since the slot is there; ``injection.watch`` asks.
        keeper: decides what the forward keeps for its backward; None in a slot without a ledger.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleDict()
        self.mixers = nn.ModuleDict()
        self.acts: dict[type[Act], Act] = {}
        self.has_fired = False
        self.keeper: Keeper | None = None
        self._handles: list[RemovableHandle] = []

    def forward(self, x: Any) -> Any:
        """Identity: a container that walks its children passes through."""
        return x

    def listen(self, module: nn.Module) -> None:
        """Register the hooks on the module this slot belongs to, once an act runs in its forward."""
        if self._handles or not any(act.listens for act in self.acts.values()):
            return
        self._handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        forget_compiled()

    def unlisten(self) -> None:
        """Take the hooks back."""
        if self._handles:
            forget_compiled()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook: every act ahead of the module's forward."""
        if not torch.compiler.is_compiling():
            if not self.has_fired:
                self.has_fired = True
            if "_is_replica" in module.__dict__:
                raise Unsupported(
                    "nn.DataParallel was asked to run a backbone with deltas: its replicas share hooks, so all would use the patches of "
                    "the first. Use DistributedDataParallel, with one process a device."
                )
            if self.keeper is not None:
                self.keeper.begin(module)
        for act in self.acts.values():
            args, kwargs = act.before(module, args, kwargs)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: the acts in reverse order; each one cleans up even where the forward, or another act, raised."""
        try:
            return _unwind(list(self.acts.values()), module, args, kwargs, output)
        finally:
            if self.keeper is not None and not torch.compiler.is_compiling():
                self.keeper.end()

    def _apply(self, fn: Any, recurse: bool = True) -> Slot:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for act in self.acts.values():
            act.apply(fn)
        return self


def _unwind(acts: list[Act], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not acts:
        return output
    try:
        output = acts[-1].after(module, args, kwargs, output)
    except BaseException:
        _unwind(acts[:-1], module, args, kwargs, None)
        raise
    return _unwind(acts[:-1], module, args, kwargs, output)


def slot_of(module: nn.Module) -> Slot | None:
    """The module's slot, or None. The root's slot lives inside its ledger."""
    child = module._modules.get(CHILD)
    if isinstance(child, Slot):
        return child
    inner = child._modules.get("slot") if child is not None else None
    return inner if isinstance(inner, Slot) else None


def open_slot(module: nn.Module) -> Slot:
    """The module's slot, made if it had none.

    Raises:
        InvalidValue: the module has an attribute of its own called ``deltatune``.
    """
    slot = slot_of(module)
    if slot is not None:
        return slot
    slot = Slot()
    slot.train(module.training)
    child = module._modules.get(CHILD)
    if child is not None and hasattr(child, "slot"):
        child.slot = slot
    else:
        check_vacant(module)
        module.add_module(CHILD, slot)
    return slot


def check_vacant(module: nn.Module) -> None:
    """The module has room for a child called ``deltatune``: nothing, or something of ours, is there.

    Raises:
        InvalidValue: it has an attribute of that name.
    """
    found = getattr(module, CHILD, None)
    if found is not None and not isinstance(found, Slot) and not hasattr(found, "slot"):
        raise InvalidValue(
            f"{type(module).__name__} has an attribute called `{CHILD}` that is not ours ({type(found).__name__}). "
            "Rename it before attaching."
        )


def close_slot(module: nn.Module) -> None:
    """Remove the module's slot, hooks and all."""
    slot = slot_of(module)
    if slot is None:
        return
    slot.unlisten()
    if module._modules.get(CHILD) is slot:
        del module._modules[CHILD]
    else:
        module._modules[CHILD].slot = None  # type: ignore[union-attr]


def thread_key() -> int:
    """Key of what one forward has in flight. Compiled code is single: Dynamo cannot ask for the thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def forget_compiled() -> None:
    """Compiled code saw the old hooks: drop it. Costs nothing where nobody has compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def input_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what the forward of a class of modules takes, in order; empty where it does not tell."""
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]) -> Tensor:
    """The tensor a module works on: the first of its forward's parameters, named ``names``, that is given one."""
    place = _first(args, kwargs, names)
    return args[place] if isinstance(place, int) else kwargs[place]  # type: ignore[no-any-return]


def replace_input(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with that tensor replaced."""
    place = _first(args, kwargs, names)
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: x}


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]) -> int | str:
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return place
    return next(name for name in (*names, *kwargs) if isinstance(kwargs.get(name), Tensor))
