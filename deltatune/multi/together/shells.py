"""Shells: a tree of modules for each job, whose frozen tensors are those of one host.

A job trains, is scored and is saved on its shell, exactly as it would be on a backbone of its own; a fresh head, and what
its delta selects in place, are the shell's own. Besides them a shell costs its Python objects, and no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbones import load_backbone
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import SelectionPatch


def shell_of(backbone: nn.Module) -> nn.Module:
    """The same modules anew around the same tensors; ``requires_grad`` is each tree's own."""
    tensors = chain(backbone.parameters(), backbone.buffers())
    return copy.deepcopy(backbone, {id(tensor): _alike(tensor) for tensor in tensors})


def _alike(tensor: Tensor) -> Tensor:
    """A Parameter of its own in the same memory; what is more than plain numbers is the same object."""
    if type(tensor) is nn.Parameter and type(tensor.data) is Tensor:
        return nn.Parameter(tensor.detach(), tensor.requires_grad)
    return tensor


def share(module: nn.Module, host: nn.Module) -> None:
    """Let go of every tensor that the host has, too, bit for bit, and hold the host's instead."""
    theirs = dict(host.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for path, owner, name, parameter in list(_owned(module)):
        other = theirs.get(path)
        if other is None or type(parameter) is not nn.Parameter or other.shape != parameter.shape or other.dtype != parameter.dtype:
            continue
        if id(parameter) not in made and torch.equal(parameter, other):
            made[id(parameter)] = nn.Parameter(other.detach(), parameter.requires_grad)
        if id(parameter) in made:
            owner._parameters[name] = made[id(parameter)]


def _owned(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), owner, name, parameter


def unshare(delta: Delta) -> None:
    """What a delta trains in place becomes its own tree's alone."""
    for entry in delta.entries:
        if isinstance(entry.patch, SelectionPatch):
            entry.parameter.data = entry.parameter.data.clone()


class Shells:
    """The shells of jobs on one backbone; the first one's tensors are the host's.

    Args:
        backbone: as ``train_together`` was given it.

    Attributes:
        host: the tree in which the shared forward runs, of the first shell's class; nothing acts in it outside of routes. None before the
            first shell.
    """

    def __init__(self, backbone: str | nn.Module) -> None:
        self.backbone = backbone
        self.host: nn.Module | None = None
        self._first: nn.Module | None = None
        self._loaded: dict[Any, tuple[int, nn.Module]] = {}
        self._seedless: set[Any] = set()

    def open(self) -> str | nn.Module:
        """What a job shall be made on: the name, or a shell of the model that was given."""
        if isinstance(self.backbone, str):
            return self.backbone
        return self._entered(self.backbone)  # not of the host, in which deltas lie by and by

    def whole(self) -> str | nn.Module:
        """The same for a job that shares nothing: the name, or a copy with weights of its own."""
        return self.backbone if isinstance(self.backbone, str) else copy.deepcopy(self.backbone)

    def load(self, name: str, **options: Any) -> nn.Module:
        """``load_backbone``, on the accelerator if there is one, with its tensors shared.

        What no fresh weights belong to is loaded twice at most, to see that.
        """
        key, seed = tuple(sorted((option, repr(value)) for option, value in options.items())), torch.initial_seed()
        before = self._loaded.get(key)
        if before is not None and (before[0] == seed or key in self._seedless):
            return self._entered(before[1])
        module = load_backbone(name, **options)
        if torch.accelerator.is_available():  # where a Trainer would move it
            module.to(torch.accelerator.current_accelerator())
        if self._first is None:
            self._first = shell_of(module)
        share(module, self._first)
        if before is not None and _same(module, before[1]):
            self._seedless.add(key)
        self._loaded[key] = seed, module
        return self._entered(module)

    def _entered(self, module: nn.Module) -> nn.Module:
        """A shell of it, and of the first one a host."""
        if self.host is None:
            self.host = shell_of(module)
        return shell_of(module)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
