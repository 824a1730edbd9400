"""UniPELT: LoRA, prefix tuning and an adapter together, each behind a gate (Mao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation
from deltatune.methods.addition.pfeiffer_adapter import PfeifferAdapter
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.checks import one_of, positive
from deltatune.methods.composed import Composed, Part
from deltatune.methods.kinds import Family, Kind, methods
from deltatune.methods.reparameterization.lora import LoRA


@methods.register("unipelt")
@dataclass(frozen=True)
class UniPELT(Composed):
    """q <- q + g_q B A x (and v alike), [g P_k; K], [g P_v; V], and h <- h + g_h (f(h W_d + b_d) W_u + b_u).

    Each g = mean over the row's positions of sigmoid(x . w + b), one number a row of the batch, from what its part is
    given: the attention's input for LoRA (where g stands for alpha / r) and for the prefix, h itself for the adapter.
    Trains all three and the gates, which start near one half. As in the authors' code the mean runs over padding too,
    and on a decoder over the whole text that it is given, so it is made for tasks with the input at hand.

    Args:
        rank: r of LoRA, at the queries and values.
        num_virtual_tokens: length of the prefix in every attention.
        reduction: d / r of the adapter, behind every feed-forward network.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.
        reparameterization: make the prefix by an MLP while training; ``export`` drops it.
        mid_dim: width of that MLP's hidden layer.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "composed"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value", "attention", "feed_forward.down")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2110.07577"

    rank: int = 8
    num_virtual_tokens: int = 10
    reduction: int = 16
    activation: Activation = "relu"
    reparameterization: bool = True
    mid_dim: int = 512

    def __post_init__(self) -> None:
        positive(self, "rank", "num_virtual_tokens", "reduction", "mid_dim")
        one_of(self, "activation", tuple(ACTIVATIONS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """LoRA, the prefix and the adapter, in the order a row meets them."""
        return (
            Part(LoRA(self.rank, alpha=self.rank), gate="input"),
            Part(PrefixTuning(self.num_virtual_tokens, self.reparameterization, self.mid_dim), gate="input"),
            Part(PfeifferAdapter(self.reduction, self.activation), gate="output"),
        )
