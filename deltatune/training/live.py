"""The bytes of live tensors, counted exactly: what a GPU's allocator would hold, on any device and on any busy machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make and those that die; what an operation needs only within itself is not seen.

    Attributes:
        bytes: of the storages that live now.
        peak: the most there were at once.
        course: what happened, in order: (number of a storage, its bytes) where it begins, (number, 0) where it ends.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self.course: list[tuple[int, int]] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._numbers = count()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            number = next(self._numbers)
            self._known[key] = weakref.ref(storage, self._forget(key, number, size))
            self.course.append((number, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int, number: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.course.append((number, 0))
            self.bytes -= size

        return gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return made


@contextmanager
def live_tensors() -> Iterator[LiveTensors]:
    """Count within the block, beginning with every tensor that Python knows; views share their storage and count once."""
    live = LiveTensors()
    for found in known_tensors():
        if found.device.type != "meta":
            live.add(found)
    with live:
        yield live


def known_tensors() -> list[Tensor]:
    """Every strided tensor that Python knows; nested ones and those of lazy modules have no shape yet and are left out."""
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor) and _is_strided(found)]


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested and not is_lazy(tensor)


def held_bytes() -> int:
    """Of the storages behind every strided tensor that Python knows."""
    storages = (found.untyped_storage() for found in known_tensors() if found.device.type != "meta")
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
