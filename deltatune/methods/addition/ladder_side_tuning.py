"""Ladder side tuning: a small network beside the frozen layers that reads them, so no backward runs through them (Sung et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, SidePatch, methods
from deltatune.structure.site import Site, modules_of


@methods.register("ladder-side-tuning")
@dataclass(frozen=True)
class LadderSideTuning(Method):
    """y <- y + s_L W_up with s_i = f_i(g_i s_{i-1} + (1 - g_i) h_i W_down_i), g_i = sigmoid(alpha_i), s_0 = h_0 W_down_0.

    h_0, ..., h_{L-1} are what the L layers of a text stack are given and h_L = y is what the stack returns, all detached.
    f_i(u) = u + gelu(norm(u) W_1i + b_1i) W_2i + b_2i stands for the paper's small transformer layers: tokens meet in the backbone,
    whose states every rung reads, so key-value caches need nothing new. They start at random, not from a pruned backbone.

    Trains W_down: (L + 1, side_dim, hidden), W_1: (L, expansion * side_dim, side_dim), W_2: (L, side_dim, expansion * side_dim),
    all uniform in +-1 / sqrt(fan in), their biases = 0, alpha: (L,) = 0, and W_up: (hidden, side_dim) = 0. In an
    encoder-decoder it stands beside the decoder: one beside the encoder would need a backward through the decoder.

    Args:
        side_dim: width of the side network; the paper takes an eighth of the backbone's.
        expansion: width of a rung's hidden layer, in side_dims.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "side network"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("stack", "!encoder.stack?")
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2206.06522"

    side_dim: int = 48
    expansion: int = 4

    def __post_init__(self) -> None:
        positive(self, "side_dim", "expansion")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One ladder a text stack.

        Raises:
            Unsupported: the module does not tell its width, or has no list of layers.
        """
        config: Any = getattr(site.module, "config", None)
        hidden = getattr(config, "hidden_size", None)
        lists = [module for module in modules_of(site.module).values() if isinstance(module, nn.ModuleList) and len(module)]
        if not isinstance(hidden, int) or not lists:
            raise Unsupported(
                f"A ladder was asked for at `{site.path}` ({type(site.module).__name__}), which has no hidden_size or no list of layers. "
                "Choose a text stack (role `stack`), or another method."
            )
        return [Ladder(hidden, len(lists[0]), self)]


class Ladder(SidePatch):
    """The side network of one stack."""

    def __init__(self, hidden: int, num_layers: int, method: LadderSideTuning) -> None:
        super().__init__()
        self.num_layers = num_layers
        side, inner = method.side_dim, method.expansion * method.side_dim
        self.W_down = _uniform(num_layers + 1, side, hidden)
        self.W_1, self.b_1 = _uniform(num_layers, inner, side), nn.Parameter(torch.zeros(num_layers, inner))
        self.W_2, self.b_2 = _uniform(num_layers, side, inner), nn.Parameter(torch.zeros(num_layers, side))
        self.alpha = nn.Parameter(torch.zeros(num_layers))
        self.W_up = nn.Parameter(torch.zeros(hidden, side))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """num_layers + 1 hidden states (batch, seq, hidden) -> (batch, seq, hidden)."""
        dtype, device = states[-1].dtype, self.W_up.device
        W_down, g = self.W_down.to(dtype), torch.sigmoid(self.alpha).to(dtype)
        s = F.linear(states[0].to(device), W_down[0])  # (batch, seq, side_dim)
        for i in range(self.num_layers):
            s = self._rung(i, g[i] * s + (1 - g[i]) * F.linear(states[i + 1].to(device), W_down[i + 1]))
        return F.linear(s, self.W_up.to(dtype)).to(states[-1])

    def _rung(self, i: int, u: Tensor) -> Tensor:
        """f_i: (..., side_dim) -> (..., side_dim)."""
        W_1, b_1, W_2, b_2 = (weights[i].to(u.dtype) for weights in (self.W_1, self.b_1, self.W_2, self.b_2))
        return u + F.linear(F.gelu(F.linear(F.layer_norm(u, u.shape[-1:]), W_1, b_1)), W_2, b_2)


def _uniform(*shape: int) -> nn.Parameter:
    """A stack of matrices, uniform in +-1 / sqrt(columns)."""
    return nn.Parameter(torch.empty(shape).uniform_(-1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1])))
