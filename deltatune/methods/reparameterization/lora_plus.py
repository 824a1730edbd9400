"""LoRA+: LoRA whose B learns faster than its A (Hayou et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.reparameterization.lora import low_rank
from deltatune.structure.site import Site


@methods.register("lora-plus")
@dataclass(frozen=True)
class LoRAPlus(Method):
    """W' = W + s B A as LoRA, with the learning rate of B ``ratio`` times that of A.

    Trains A: (rank, in), kaiming uniform, and B: (out, rank) = 0. For wide models LoRA with one rate learns its
    features too slowly: A wants a rate that falls with the width, B one that does not.

    Args:
        rank: r, at least 1.
        alpha: s = alpha / rank.
        dropout: on x, in training; only where it runs on a linear map.
        ratio: lambda, at least 1.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-4
    source: ClassVar[str] = "arXiv:2402.12354"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    ratio: float = 16.0

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha", "ratio")
        fraction(self, "dropout")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        return low_rank(site, self.rank, self.alpha / self.rank, self.dropout)

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """The B at ``ratio`` times ``lr``; the A, and a head, at ``lr``."""
        fast = {name for name in parameters if name.rpartition(".")[2] == "lora_B"}
        return [
            {"params": [parameter for name, parameter in parameters.items() if name not in fast], "lr": lr},
            {"params": [parameters[name] for name in parameters if name in fast], "lr": self.ratio * lr},
        ]
