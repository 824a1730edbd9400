"""The bottleneck h -> U(f(D(h))) that every adapter is made of, its plain maps D and U, and the patch that runs it in series."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.kinds import OutputPatch
from deltatune.methods.lanes import Lane

Activation = Literal["gelu", "gelu_new", "relu", "silu", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""f of every adapter; ``gelu_new`` is the approximation by tanh that older checkpoints were trained with."""


@runtime_checkable
class Affine(Protocol):
    """A map h W^T + b, whatever W is made of."""

    def affine(self) -> tuple[Tensor, Tensor]:
        """W (out, in) and b (out,)."""


class Dense(nn.Module):
    """h W^T + b, with W stored (out, in) and b = 0 at the start."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.W = nn.Parameter(W)
        self.b = nn.Parameter(torch.zeros(W.shape[0]))

    def forward(self, h: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(h, self.W.to(h), self.b.to(h))

    def affine(self) -> tuple[Tensor, Tensor]:
        """W and b."""
        return self.W, self.b


class Bottleneck(nn.Module):
    """U(f(D(h))).

    Args:
        D: the map down, (..., width) -> (..., r).
        U: the map up, (..., r) -> (..., width).
        activation: f, by its name.
    """

    def __init__(self, D: nn.Module, U: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.D, self.U = D, U
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.U(ACTIVATIONS[self.activation](self.D(h)))  # type: ignore[no-any-return]

    def lane(self, reads: Literal["input", "output"], scale: float = 1.0) -> Lane | None:
        """y + s U(f(D(h))) with h = x or y as data; None where a map is none that is known."""
        if not isinstance(self.D, Affine) or not isinstance(self.U, Affine):
            return None
        (W_d, b_d), (W_u, b_u) = self.D.affine(), self.U.affine()
        scales = {"U": scale, "e": scale} if scale != 1 else {}
        return Lane("bottleneck", {"D": W_d.T, "c": b_d, "U": W_u.T, "e": b_u}, (self.activation, reads), scales=scales)


class Serial(OutputPatch):
    """y + U(f(D(y)))."""

    def __init__(self, bottleneck: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return y + self.bottleneck(y)  # type: ignore[no-any-return]

    def lane(self) -> Lane | None:
        """The bottleneck."""
        bottleneck = getattr(self.bottleneck, "lent", self.bottleneck)  # one that several sites share
        return bottleneck.lane("output") if isinstance(bottleneck, Bottleneck) else None


def dense_bottleneck(width: int, r: int, activation: Activation, init_std: float = 0.0, out: int | None = None) -> Bottleneck:
    """W_d: (r, width) ~ N(0, 0.01^2) and W_u: (out or width, r) = 0; both ~ N(0, init_std^2) where that is not 0."""
    W_d = torch.randn(r, width) * (init_std or 0.01)
    return Bottleneck(Dense(W_d), Dense(torch.randn(out or width, r) * init_std), activation)


def reduced(width: int, reduction: int, multiple: int = 1) -> int:
    """r = width / reduction, rounded down to a multiple, and at least one multiple."""
    return max(width // reduction // multiple, 1) * multiple


def glorot(W: Tensor) -> Tensor:
    """W, glorot uniform; each matrix of a stack by itself."""
    for matrix in W.view(-1, *W.shape[-2:]):
        nn.init.xavier_uniform_(matrix)
    return W
