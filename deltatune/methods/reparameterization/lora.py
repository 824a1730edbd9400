"""LoRA: a low-rank change of a linear map (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.structure.site import Site


@methods.register("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s B A with s = alpha / rank; A: (rank, in), kaiming uniform; B: (out, rank) = 0.

    Trains A and B. On a linear map it runs as y + s (x A^T) B^T; where the weight is read without calling its module,
    or is tied or a convolution, it changes the weight itself.

    Args:
        rank: r, at least 1.
        alpha: the scale is alpha / rank, or alpha / sqrt(rank) with ``rank_stabilized``.
        dropout: on x, in training; only where LoRA runs on a linear map.
        rank_stabilized: rsLoRA (Kalajdzievski 2023).

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2106.09685"

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        fraction(self, "dropout")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        if isinstance(site.module, nn.Embedding) and not site.tied:
            return [LoRAEmbedding(site.module, self)]
        if site.parameter is None and not site.tied and site.is_linear:
            return [LoRALinear(site.in_features, site.out_features, self)]
        parameter = site.parameter or "weight"
        stacked = site.parameter is not None and site.weight.ndim == 3
        return [LoRAWeight(parameter, site.part(site.weight), self, stacked=stacked, transposed=site.transposed)]


class LoRALinear(OutputPatch):
    """y + s (dropout(x) A^T) B^T."""

    commutes = "add"

    def __init__(self, in_features: int, out_features: int, method: LoRA) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(_kaiming(torch.empty(method.rank, in_features)))
        self.lora_B = nn.Parameter(torch.zeros(out_features, method.rank))
        self.scale, self.dropout = method.scale, method.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        h = F.linear(x, self.lora_A.to(y.dtype))  # (..., rank)
        return y + F.linear(h, self.lora_B.to(y.dtype)) * self.scale

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, in the precision of W."""
        return weight + self.scale * self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype), bias


class LoRAEmbedding(OutputPatch):
    """y + s e A^T[ids] B^T: a low-rank change of an embedding table whose rows are read times e (1 for most models)."""

    commutes = "add"

    def __init__(self, table: nn.Embedding, method: LoRA) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(method.rank, table.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn(table.embedding_dim, method.rank))
        self.scale = method.scale
        self.embed_scale = float(getattr(table, "embed_scale", 1.0))
        self.padding_idx = table.padding_idx

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Ids (...), embeddings (..., width) -> (..., width)."""
        h = F.embedding(x, self.lora_A.T, self.padding_idx)  # (..., rank); padding does not train, as in the table
        return y + F.linear(h, self.lora_B).to(y.dtype) * (self.scale * self.embed_scale)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table (rows, width) plus s (B A)^T."""
        return weight + (self.scale * self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype)).T, bias


class LoRAWeight(WeightPatch):
    """theta + s B A, with theta seen as one matrix (out, rest), or as a stack of them (experts, out, in).

    A convolution (out, in, *kernel) is one matrix (out, in * kernel).
    """

    commutes = "add"

    def __init__(self, parameter: str, theta: Tensor, method: LoRA, *, stacked: bool, transposed: bool) -> None:
        super().__init__()
        self.parameter = parameter
        stack = theta.shape[:1] if stacked else theta.shape[:0]
        rows, columns = (theta.shape[1], theta.shape[2]) if stacked else (theta.shape[0], theta[0].numel())
        if transposed:
            rows, columns = columns, rows
        self.transposed = transposed
        self.lora_A = nn.Parameter(_kaiming(torch.empty(*stack, method.rank, columns)))
        self.lora_B = nn.Parameter(torch.zeros(*stack, rows, method.rank))
        self.scale = method.scale

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta + s B A, of the same shape."""
        change = self.scale * self.lora_B @ self.lora_A  # (..., out, rest)
        change = change.mT if self.transposed else change
        return theta + change.reshape(theta.shape).to(theta.dtype)


def _kaiming(a: Tensor) -> Tensor:
    for matrix in a if a.ndim == 3 else [a]:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return a
