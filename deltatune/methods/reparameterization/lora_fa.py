"""LoRA-FA: LoRA with a frozen A (Zhang et al. 2023)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.reparameterization.lora import LoRALinear, LoRAWeight
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.structure.site import Site


@methods.register("lora-fa")
@dataclass(frozen=True)
class LoRAFA(Method):
    """W' = W + s B A with s = alpha / rank and A: (rank, in) ~ U(-1, 1) / sqrt(in) frozen; trains B: (out, rank) = 0.

    The change of W stays in the row space of A. Backward needs x A^T: (..., rank), not x, so a linear map keeps rank
    numbers of its input instead of in. A comes from ``seed`` and the site's path, so files hold B alone.

    Args:
        rank: r, at least 1.
        alpha: s = alpha / rank.
        dropout: on x, in training; only where it runs on a linear map.
        seed: of A.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2308.03303"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        fraction(self, "dropout")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        scale = self.alpha / self.rank
        if acts_on_outputs(site):
            return [LoRALinear(self._frozen(site, self.rank, site.in_features), site.out_features, scale, self.dropout)]
        view = MatrixView.of(site)
        return [LoRAWeight(view, self._frozen(site, *view.stack, self.rank, view.columns), scale)]

    def _frozen(self, site: Site, *shape: int) -> Tensor:
        """A of one site: the same on every machine."""
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}:{site.key}".encode()))
        A: Tensor = torch.empty(shape, device="cpu").uniform_(-1, 1, generator=generator) / shape[-1] ** 0.5
        return A
