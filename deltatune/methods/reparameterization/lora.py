"""LoRA: a low-rank change of a linear map (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue, NoSite
from deltatune.methods.checks import fraction, one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs, kaiming
from deltatune.structure.site import Site
from deltatune.structure.where import expand, spoken

Init = Literal["kaiming", "gaussian", "orthogonal"]


@methods.register("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s B A with s = alpha / rank; A: (rank, in) starts at random, B: (out, rank) = 0.

    Trains A and B. On a linear map it runs as y + s (x A^T) B^T; where the weight is read without calling its module,
    or is tied or a convolution, it changes the weight itself. In an embedding, which reads rows, A = 0 and B ~ N(0, 1).

    Args:
        rank: r, at least 1.
        alpha: the scale is alpha / rank, or alpha / sqrt(rank) with ``rank_stabilized``.
        dropout: on x, in training; only where LoRA runs on a linear map.
        rank_stabilized: rsLoRA (Kalajdzievski 2023).
        ranks: other ranks, as pairs of a role or the end of a path, and a rank; the first that fits a site counts. On
            the command line ``attention.query:4,feed_forward.*:16``.
        init: how A starts: ``kaiming`` (uniform, as a linear map), ``gaussian`` (of deviation 1 / rank), or
            ``orthogonal`` (orthonormal rows). B = 0 with all of them.

    Raises:
        InvalidValue: a field out of its range.
        NoSite: an entry of ``ranks`` fits none of the sites.
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
    ranks: tuple[tuple[str, int], ...] = ()
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        fraction(self, "dropout")
        one_of(self, "init", tuple(STARTS))
        for pattern, rank in self.ranks:
            expand(pattern)
            if not (pattern and rank > 0):
                raise InvalidValue(f"LoRA(ranks={self.ranks!r}) was asked for; each entry is a role or a path, and a rank of at least 1.")

    def scale(self, rank: int) -> float:
        """s at a site of that rank."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def rank_at(self, site: Site) -> int:
        """r at one site: that of the first entry of ``ranks`` that fits, else ``rank``."""
        return next((rank for pattern, rank in self.ranks if _fits(pattern, site)), self.rank)

    def survey(self, sites: Sequence[Site]) -> None:
        """An entry of ``ranks`` that fits no site is a mistake."""
        for pattern, rank in self.ranks:
            if not any(_fits(pattern, site) for site in sites):
                roles = sorted({site.role or site.key for site in sites})
                raise NoSite(
                    f"LoRA asks for rank {rank} at `{pattern}`, which fits none of its {len(sites)} sites "
                    f"({', '.join(f'`{role}`' for role in roles[:6])}{', ...' if len(roles) > 6 else ''}). Correct `ranks` or `where`."
                )

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        rank = self.rank_at(site)
        return low_rank(site, rank, self.scale(rank), self.dropout, STARTS[self.init])


def low_rank(site: Site, rank: int, scale: float, dropout: float = 0.0, start: Callable[..., Tensor] = kaiming) -> Sequence[Patch]:
    """The patch of W + s B A for one site; none where it has no matrix.

    Args:
        site: where it will sit.
        rank: r.
        scale: s.
        dropout: on x, where it runs on a linear map.
        start: makes A from its shape, (rank, in) or (experts, rank, in): a Parameter, or a plain tensor if A does not train.
    """
    if not site.has_matrix:
        return []
    if isinstance(site.module, nn.Embedding) and not site.tied:
        return [LoRAEmbedding(site.module, rank, scale)]
    if acts_on_outputs(site):
        return [LoRALinear(start(rank, site.in_features), site.out_features, scale, dropout)]
    view = MatrixView.of(site)
    return [LoRAWeight(view, start(*view.stack, rank, view.columns), scale)]


class LoRALinear(OutputPatch):
    """y + s (dropout(x) A^T) B^T."""

    commutes = "add"
    lora_A: Tensor

    def __init__(self, A: Tensor, out_features: int, scale: float, dropout: float) -> None:
        super().__init__()
        hold(self, "lora_A", A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, A.shape[0]))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        h = F.linear(x, self.lora_A.to(y.dtype))  # (..., rank)
        return y + F.linear(h, self.lora_B.to(y.dtype)) * self.scale

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s."""
        return None if self.dropout and self.training else (self.lora_A, self.lora_B, self.scale)

    def lane(self) -> Lane:
        """(x A^T) (s B)^T."""
        return Lane("low-rank", {"A": self.lora_A.T, "B": self.lora_B.T}, (self.dropout * self.training,), scales={"B": self.scale})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, in the precision of W."""
        return weight + self.scale * self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype), bias


class LoRAEmbedding(OutputPatch):
    """y + s e A^T[ids] B^T: a low-rank change of an embedding table whose rows are read times e (1 for most models)."""

    commutes = "add"

    def __init__(self, table: nn.Embedding, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, table.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn(table.embedding_dim, rank))
        self.scale = scale
        self.embed_scale = float(getattr(table, "embed_scale", 1.0))
        self.padding_idx = table.padding_idx

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Ids (...), embeddings (..., width) -> (..., width)."""
        h = F.embedding(x, self.lora_A.T, self.padding_idx)  # (..., rank); padding does not train, as in the table
        return y + F.linear(h, self.lora_B).to(y.dtype) * (self.scale * self.embed_scale)

    def lane(self) -> Lane:
        """A^T[ids] (s e B)^T."""
        return Lane("lookup", {"A": self.lora_A.T, "B": self.lora_B.T}, scales={"B": self.scale * self.embed_scale})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table (rows, width) plus s (B A)^T."""
        return weight + (self.scale * self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype)).T, bias


class LoRAWeight(WeightPatch):
    """theta + s B A, with theta seen as one matrix (out, in), or as a stack of them."""

    commutes = "add"
    lora_A: Tensor

    def __init__(self, view: MatrixView, A: Tensor, scale: float) -> None:
        super().__init__()
        self.parameter, self.view, self.scale = view.parameter, view, scale
        hold(self, "lora_A", A)
        self.lora_B = nn.Parameter(torch.zeros(*view.stack, view.rows, A.shape[-2]))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta + s B A, of the same shape."""
        return theta + self.view.write(self.scale * self.lora_B @ self.lora_A, theta)

    def lane_of(self, theta: Tensor) -> Lane | None:
        """x A^T (s B)^T."""
        if not self.view.is_plain:
            return None
        return Lane("low-rank", {"A": self.lora_A.T, "B": self.lora_B.T}, (0.0,), scales={"B": self.scale})


def hold(patch: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a patch a Parameter, or a tensor that neither trains nor is stored in files."""
    if isinstance(tensor, nn.Parameter):
        patch.register_parameter(name, tensor)
    else:
        patch.register_buffer(name, tensor, persistent=False)


def gaussian(*shape: int) -> nn.Parameter:
    """N(0, 1 / rank^2)."""
    return nn.Parameter(torch.randn(shape) / shape[-2])


def orthogonal(*shape: int) -> nn.Parameter:
    """Each matrix with orthonormal rows (columns, where it has fewer)."""
    matrices = torch.empty(shape)
    for matrix in matrices.reshape(-1, *shape[-2:]):
        nn.init.orthogonal_(matrix)
    return nn.Parameter(matrices)


STARTS: dict[str, Callable[..., nn.Parameter]] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
"""How A can start."""


def _fits(pattern: str, site: Site) -> bool:
    """The site has such a role, or such an end of its path."""
    names = [*(spoken(site.role) if site.role else []), site.key]
    return any(fnmatchcase(name, form) for name in names for form in expand(pattern)) or any(
        fnmatchcase(site.key, f"*.{form}") for form in expand(pattern)
    )
