"""(IA)^3: learned rescaling of keys, values and the feed-forward network's hidden layer (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import Family, InputPatch, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView
from deltatune.structure.site import Site


@methods.register("ia3")
@dataclass(frozen=True)
class IA3(Method):
    """K <- l_k * K, V <- l_v * V, and the input of the feed-forward network's second matrix <- l_ff * hidden.

    Trains l_k, l_v: (d,) and l_ff: (d_ff,), all ones at the start, so a fresh delta is the identity to the bit. The
    folder follows Ding et al., who count vectors that multiply activations as added modules. Where a weight is read without
    calling its module, as in ``nn.MultiheadAttention`` and raw experts, it runs as diag(l) W and l * b, or as W diag(l),
    with an l for each expert.

    Args:
        inputs: last words of the roles that are rescaled at their input; all others are at their output. PEFT's default
            for BERT also has ``output`` there.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.key?", "attention.value?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 3e-3
    source: ClassVar[str] = "arXiv:2205.05638"

    inputs: tuple[str, ...] = ("down",)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One vector a site that has a matrix."""
        if not site.has_matrix:
            return []
        at_input = site.leaf in self.inputs
        if site.parameter is not None:
            weight = ScaledWeight(MatrixView.of(site), at_input)
            bias = None if at_input else _bias_of(site)
            return [weight] if bias is None else [weight, ScaledBias(bias, weight)]
        if at_input:
            return [ScaledInput(site.in_features)]
        return [ScaledOutput(site.out_features, isinstance(site.module, nn.Embedding))]


class ScaledOutput(OutputPatch):
    """l * y."""

    commutes = "multiply"

    def __init__(self, width: int, is_table: bool = False) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width))
        self.is_table = is_table

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return y * self.l.to(y.dtype)

    def lane(self) -> Lane:
        """l."""
        return Lane("scale", {"l": self.l})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(l) W and l * b; W diag(l) for a table of embeddings, (rows, width)."""
        scale = self.l.to(weight.dtype)
        return weight * (scale if self.is_table else scale[:, None]), None if bias is None else scale * bias


class ScaledInput(InputPatch):
    """l * x."""

    commutes = "multiply"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.l.to(x.dtype)

    def lane(self) -> Lane:
        """l."""
        return Lane("scale", {"l": self.l})

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W diag(l)."""
        return weight * self.l.to(weight.dtype), bias


class ScaledWeight(WeightPatch):
    """diag(l) W or, ``at_input``, W diag(l), with theta seen as one matrix (out, in), or as a stack of them."""

    commutes = "multiply"

    def __init__(self, view: MatrixView, at_input: bool) -> None:
        super().__init__()
        self.parameter, self.view, self.at_input = view.parameter, view, at_input
        self.l = nn.Parameter(torch.ones(*view.stack, view.columns if at_input else view.rows))

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        scale = self.l.unsqueeze(-2 if self.at_input else -1)  # (..., 1, in) or (..., out, 1)
        return theta * self.view.write(scale.expand(*self.view.stack, self.view.rows, self.view.columns), theta)


class ScaledBias(WeightPatch):
    """l * b, with the l of the weight beside it."""

    commutes = "multiply"

    def __init__(self, parameter: str, weight: ScaledWeight) -> None:
        super().__init__()
        self.parameter = parameter
        self._weight = (weight,)  # in a tuple, so that it is no child: its own entry registers it

    @property
    def shared(self) -> ScaledWeight:
        """The patch that has l."""
        return self._weight[0]

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta * self.shared.l.to(theta)


def _bias_of(site: Site) -> str | None:
    """The bias beside the site's raw weight, by its name; None where there is none."""
    name = site.parameter or "weight"
    bias = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
    owner, _, own = bias.rpartition(".")
    return bias if site.module.get_submodule(owner)._parameters.get(own) is not None else None
