"""Layers below the lowest delta: what they give for a row is the same in every epoch, so it is computed once and kept.

A transformer is a chain of layers h_{i+1} = f_i(h_i). Where no parameter of f_0 .. f_{k-1} trains, h_k of a row never changes, once
dropout is off there. ``FrozenPrefix`` finds k, runs the layers below without gradients, and lets a forward begin at layer k with hidden
states that are given. ``training.kept`` says where these states lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import ledger_of
from deltatune.injection.outputs import first_output, replace_output
from deltatune.injection.slot import first_input, input_names
from deltatune.injection.switching import deltas
from deltatune.methods.kinds import Phased
from deltatune.structure.index import index
from deltatune.tasks.tensors import evaluating

Call = Callable[[], Any]
"""One call of the backbone on some batch."""


class _Enough(Exception):
    """The hidden states are there; the rest of the forward is not needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("enough")
        self.states = states


@dataclass
class _Seen:
    """What one call of a layer gave: hidden states, and whether nothing else and without a gradient."""

    is_fixed: bool
    shape: torch.Size
    ended: int


@dataclass(frozen=True)
class FrozenPrefix:
    """The layers of a backbone below the lowest delta.

    Attributes:
        layers: those below, in order.
        below: every module that has run by then.
        total: how many layers there are.
    """

    layers: tuple[nn.Module, ...]
    below: tuple[nn.Module, ...]
    total: int

    @classmethod
    def of(cls, backbone: nn.Module, call: Call, batch: tuple[int, int]) -> FrozenPrefix:
        """Find them by one call of the backbone.

        Args:
            backbone: with what trains attached.
            call: calls it on a batch.
            batch: rows and tokens of that batch.

        Raises:
            InvalidValue: there is nothing below, or it cannot be told apart.
        """
        phased = [delta.name for delta in _acting(backbone) if delta.trainable and isinstance(delta.method, Phased)]
        if phased:
            raise _nothing(f"`{phased[0]}` trains in phases, which need not train the same layers")
        layers = _layers(backbone)
        seen, started, ended = _watch(backbone, layers, call)
        settled: list[_Seen] = []
        for one in seen:
            if one is None or not one.is_fixed or tuple(one.shape[:2]) != batch:
                break
            settled.append(one)
        fixed = len(settled)
        for delta in _acting(backbone):
            fixed = min(fixed, _room(delta, seen, started))
        if fixed == 0:
            raise _nothing("something trains in the lowest layer, or ahead of it, or a layer gives more than hidden states")
        end = settled[fixed - 1].ended
        return cls(tuple(layers[:fixed]), tuple(module for module, time in ended.items() if time <= end), len(layers))

    def states(self, backbone: nn.Module, call: Call) -> Tensor:
        """The hidden states behind the last of the layers, (rows, tokens, width), without dropout; the rest of the call is left out."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Enough(first_output(output))

        handle = self.layers[-1].register_forward_hook(stop)
        try:
            with evaluating(backbone), torch.no_grad():
                call()
        except _Enough as found:
            return found.states
        finally:
            handle.remove()
        raise _nothing("the last of the frozen layers was not called")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without dropout below, for a moment."""
        parts = [part for module in self.below for part in module.modules()]
        modes = [part.training for part in parts]
        for part in parts:
            part.training = False
        try:
            yield
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode

    @contextmanager
    def given(self, states: Tensor) -> Iterator[None]:
        """Within it, the backbone begins above its frozen layers, with these hidden states (rows, tokens, width)."""
        with self.quiet(), ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_skipped(layer))
            handle = self.layers[-1].register_forward_hook(lambda module, args, output: replace_output(output, states))
            stack.callback(handle.remove)
            yield


@contextmanager
def _skipped(layer: nn.Module) -> Iterator[None]:
    """The layer gives what it is given."""
    names = input_names(type(layer))
    before = vars(layer).get("forward")
    vars(layer)["forward"] = lambda *args, **kwargs: first_input(args, kwargs, names)
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = before


def _layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of the backbone's one stack, in order."""
    ledger = ledger_of(backbone)
    sites = [site for site in (ledger.index(backbone) if ledger is not None else index(backbone)) if site.leaf == "layer"]
    lists = {site.layer_list.path for site in sites if site.layer_list is not None}
    if len(lists) != 1:
        raise _nothing(f"it has {len(lists)} stacks of layers, and one is wanted")
    return [site.module for site in sorted(sites, key=lambda site: site.layer or 0)]


def _watch(
    backbone: nn.Module, layers: Sequence[nn.Module], call: Call
) -> tuple[list[_Seen | None], dict[nn.Module, int], dict[nn.Module, int]]:
    """What each layer gave in one call, None where that is not hidden states or not once; when each module began, and ended at last."""
    seen: list[_Seen | None] = [None] * len(layers)
    places = {module: place for place, module in enumerate(layers)}
    started: dict[nn.Module, int] = {}
    ended: dict[nn.Module, int] = {}
    clock = count()

    def begin(module: nn.Module, args: Any) -> None:
        started.setdefault(module, next(clock))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        again = module in ended
        ended[module] = next(clock)
        if module in places and isinstance(output, Tensor) and output.ndim == 3:
            seen[places[module]] = _Seen(not output.requires_grad and not again, output.shape, ended[module])

    handles = [module.register_forward_pre_hook(begin) for module in backbone.modules()]
    handles += [module.register_forward_hook(end) for module in backbone.modules()]
    try:
        with evaluating(backbone), torch.enable_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return seen, started, ended


def _acting(backbone: nn.Module) -> list[Delta]:
    return [delta for delta in deltas(backbone) if delta.enabled]


def _room(delta: Delta, seen: Sequence[_Seen | None], started: dict[nn.Module, int]) -> int:
    """How many layers end before the delta's first part is reached; what is frozen may lie within layers, but not read several."""
    room = len(seen)
    for entry in delta.entries:
        layer = entry.site.layer
        if layer is not None:
            room = min(room, layer) if delta.trainable else room
            continue
        time = started.get(entry.site.module, -1)
        room = min(room, sum(one is not None and one.ended < time for one in seen))
    return room


def _nothing(why: str) -> InvalidValue:
    return InvalidValue(
        f"`keep_frozen` was asked for, but there are no frozen layers whose outputs could be kept: {why}. Leave it out, or train fewer "
        "layers, as with `layers=top:2`."
    )
