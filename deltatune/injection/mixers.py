"""Mixers: trained layers that decide, token by token, how much of what several deltas change takes effect at a module.

With y what the module returns and z_i = F_i(f, x) - y what member i changes of it:

    gated     y + sum_i g_i(y) z_i       g(y) = sigmoid(y U + c)
    fusion    y + sum_i s_i(y) z_i V     s(y) = softmax_i((y Q) . (z_i K))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltatune.injection.slot import How


class Mixer(nn.Module, ABC):
    """y <- mix(y; z_1, .., z_n), one layer a module; its parameters belong to the composition.

    Class attributes:
        least: so many members must act on a module, or there is nothing to mix.
        freezes_members: the members do not train, unless they are unfrozen; but for those that only train a task head.
        learning_rate: what ``dt.train`` uses when none is given.

    Args:
        width: width of y.
        members: how many act on the module.
    """

    least: ClassVar[int] = 1
    freezes_members: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    @abstractmethod
    def forward(self, y: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """The mixed output.

        Args:
            y: what the module returns without the members, (..., width).
            changes: z_1, .., z_n, each (..., width).
        """

    def penalty(self) -> Tensor:
        """A term of its own in the loss, a scalar; zero for most."""
        return torch.zeros(())


class Gate(Mixer):
    """y + sum_i g_i(y) z_i with g(y) = sigmoid(y U + c), U: (width, members) and c: (members,); every g starts at one half."""

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(width, members))
        self.c = nn.Parameter(torch.zeros(members))

    def forward(self, y: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """(..., width) and n times (..., width) -> (..., width)."""
        g = torch.sigmoid(y @ self.U.to(y.dtype) + self.c.to(y.dtype))  # (..., members)
        for i, z in enumerate(changes):
            y = y + z * g[..., i : i + 1]
        return y


class Fusion(Mixer):
    """AdapterFusion (Pfeiffer et al. 2021): y + sum_i s_i z_i V with s = softmax_i((y Q) . (z_i K)); Q, K, V: (width, width).

    An attention over the members for each token: the query is the module's output, keys and values are what the members
    add to it. Q and K start at N(0, 0.02^2), V at the identity, near which ``penalty`` keeps it: 0.01 |V - I|^2.
    """

    least: ClassVar[int] = 2
    freezes_members: ClassVar[bool] = True
    INIT_STD: ClassVar[float] = 0.02
    STRENGTH: ClassVar[float] = 0.01

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.randn(width, width) * self.INIT_STD)
        self.K = nn.Parameter(torch.randn(width, width) * self.INIT_STD)
        self.V = nn.Parameter(torch.eye(width))

    def forward(self, y: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """(..., width) and n times (..., width) -> (..., width)."""
        z = torch.stack(tuple(changes), dim=-2)  # (..., members, width)
        q = y @ self.Q.to(y.dtype) @ self.K.to(y.dtype).T  # (..., width): (y Q) . (z K) = ((y Q) K^T) . z
        s = torch.softmax((z * q.unsqueeze(-2)).sum(-1), dim=-1)  # (..., members)
        mixed = (s.unsqueeze(-1) * z).sum(-2).to(y.dtype)  # (..., width): V is linear, so it is applied once, to the sum
        return y + (mixed @ self.V.to(y.dtype)).to(y.dtype)

    def penalty(self) -> Tensor:
        """0.01 |V - I|^2."""
        return self.STRENGTH * (self.V - torch.eye(len(self.V), dtype=self.V.dtype, device=self.V.device)).square().sum()


MIXERS: dict[How, type[Mixer]] = {"gated": Gate, "fusion": Fusion}
"""The mixer of each way to compose that trains one."""
