"""MAM adapter: prefixes in the attentions, scaled parallel adapters beside the feed-forward networks (He et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.addition.scaled_parallel_adapter import ScaledParallelAdapter
from deltatune.methods.checks import positive
from deltatune.methods.composed import Composed, Part
from deltatune.methods.kinds import Family, Kind, methods


@methods.register("mam")
@dataclass(frozen=True)
class MAM(Composed):
    """K <- [P_k; K], V <- [P_v; V] in every attention, and h <- h + s (f(x W_d + b_d) W_u + b_u) beside every feed-forward network.

    A mix-and-match: a short prefix, which is best at small budgets, where heads attend; the budget itself where the paper
    finds it is used best, in a scaled parallel adapter with f = ReLU. Trains both: ``prefix-tuning`` with its MLP, which
    ``export`` drops, and ``scaled-parallel-adapter``. With l = 30 and r = 512 it is 6.7% of BART-large.

    Args:
        num_virtual_tokens: l.
        bottleneck_dim: r; 512 in the paper for BART-large, 16 for its smallest budget.
        scale: s, greater than 0.
        reparameterization: make the prefix by an MLP while training.
        mid_dim: width of that MLP's hidden layer.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "composed"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention", "feed_forward.down")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-4
    source: ClassVar[str] = "arXiv:2110.04366"

    num_virtual_tokens: int = 30
    bottleneck_dim: int = 64
    scale: float = 4.0
    reparameterization: bool = True
    mid_dim: int = 512

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "bottleneck_dim", "scale", "mid_dim")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The prefix and the adapter."""
        prefix = PrefixTuning(self.num_virtual_tokens, self.reparameterization, self.mid_dim)
        return Part(prefix), Part(ScaledParallelAdapter(self.bottleneck_dim, self.scale))
