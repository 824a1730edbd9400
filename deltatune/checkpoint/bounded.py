"""A bound on memory while a method is built from a file: an edited field could ask for any amount of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltatune.errors import CheckpointError

SIZED: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.zeros,
    }
)
"""Functions that make tensors of any size from a few numbers; all others work on tensors that are there."""


class Bounded(TorchFunctionMode):
    """Within it, tensors made from nothing may take ``limit`` bytes in all. Each is sized up before it is allocated.

    Args:
        limit: bytes.
        asked: who asks, for the error.
    """

    def __init__(self, limit: int, asked: str) -> None:
        super().__init__()
        self.limit, self.asked = limit, asked
        self.used = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Size up, then call."""
        kwargs = kwargs or {}
        if func in SIZED:
            shape_of: Tensor = func(
                *args, **{name: value for name, value in kwargs.items() if name not in ("generator", "out")} | {"device": "meta"}
            )
            self.used += shape_of.numel() * shape_of.element_size()
            if self.used > self.limit:
                raise CheckpointError(
                    f"{self.asked} asks for more than {self.limit:,} bytes of memory, which neither its file nor this backbone explains. "
                    "Its record was edited; save it again."
                )
        return func(*args, **kwargs)
