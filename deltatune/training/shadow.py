"""A backbone without its numbers: a step on it makes the tensors that a real one makes, in shape only.

Weights are torch's fake tensors, which know shape, type and device and hold no bytes. Whole numbers stay what they are, so that what
depends on them alone, such as positions and masks, is computed, and code that reads a value finds one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltatune.training.live import known_tensors

T = TypeVar("T")

SMALL = 2**20
"""Numbers of a tensor up to which it is computed where it can be."""


class _Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes what follows from real tensors alone, as long as it is small; the rest stays a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        try:
            made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            made = None
        if any(isinstance(leaf, Tensor) and leaf.numel() > SMALL for leaf in tree_leaves(made)):
            return made
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def shadow_of(things: T) -> Iterator[T]:
    """A copy of a backbone, its deltas and the like without weights, and the surroundings in which they may be called.

    The things stay as they are. Within the block nothing real is computed but what is small and depends on whole numbers alone.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with unset_fake_temporarily():
            shapes = {id(tensor): mode.from_tensor(tensor) for tensor in known_tensors() if _is_weight(tensor)}
            shadow = copy.deepcopy(things, shapes)
        with _Known():  # type: ignore[no-untyped-call]
            yield shadow


def _is_weight(tensor: Tensor) -> bool:
    wanted = tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > SMALL
    return wanted and not isinstance(tensor, FakeTensor)
