"""Invertible adapter: a coupling behind the embedding that is undone ahead of the LM head (Pfeiffer et al. 2020, MAD-X)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, dense_bottleneck, reduced
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, InputPatch, Kind, Method, OutputPatch, Patch, methods
from deltatune.structure.site import Site


@methods.register("invertible-adapter")
@dataclass(frozen=True)
class InvertibleAdapter(Method):
    """o_1 = e_1 + F(e_2), o_2 = e_2 + G(o_1) for the halves [e_1; e_2] of embeddings, and the inverse ahead of the LM head.

        inverse: e_2 = o_2 - G(o_1), e_1 = o_1 - F(e_2)

    F and G are bottlenecks f(h W_d + b_d) W_u + b_u from one half to the other, W_d: (d / 2, r) ~ N(0, 0.01^2), W_u: (r,
    d / 2) = 0, so that a fresh adapter is the identity to the bit. Trains F and G, one pair for all embeddings and the
    heads of their width. It learns a language beside a serial adapter in every layer; task adapters go on top of both.

    Args:
        reduction: (d / 2) / r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("embedding", "lm_head?")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2005.00052"

    reduction: int = 2
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        positive(self, "reduction")
        one_of(self, "activation", tuple(ACTIVATIONS))

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """One coupling a width.

        Raises:
            Unsupported: a width has no halves.
        """
        couplings = nn.ModuleDict()
        for width in dict.fromkeys(_width(site) for site in sites if _has_coupling(site)):
            if width < 2:
                raise Unsupported("An invertible adapter was asked for where the width is 1, which has no halves. Choose other sites.")
            second = width // 2
            first = width - second
            F = dense_bottleneck(second, reduced(second, self.reduction), self.activation, out=first)
            G = dense_bottleneck(first, reduced(first, self.reduction), self.activation, out=second)
            couplings[str(width)] = Coupling(F, G)
        return couplings.to(sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The inverse at an LM head, the coupling elsewhere; nothing at a task head."""
        if not _has_coupling(site):
            return []
        assert isinstance(shared, nn.ModuleDict)
        coupling = shared[str(_width(site))]
        assert isinstance(coupling, Coupling)
        return [Uncoupled(coupling)] if site.leaf == "lm_head" else [Coupled(coupling)]


class Coupling(nn.Module):
    """A NICE coupling layer (Dinh et al. 2015) of F: (..., d_2) -> (..., d_1) and G: (..., d_1) -> (..., d_2), with d_1 + d_2 = d."""

    def __init__(self, F: nn.Module, G: nn.Module) -> None:
        super().__init__()
        self.F, self.G = F, G

    def forward(self, e: Tensor) -> Tensor:
        """[e_1; e_2] -> [o_1; o_2], (..., d)."""
        e_1, e_2 = e.chunk(2, dim=-1)
        change_1 = self.F(e_2)
        return e + torch.cat([change_1, self.G(e_1 + change_1)], dim=-1)

    def inverse(self, o: Tensor) -> Tensor:
        """[o_1; o_2] -> [e_1; e_2], (..., d)."""
        o_1, o_2 = o.chunk(2, dim=-1)
        change_2 = self.G(o_1)
        return o - torch.cat([self.F(o_2 - change_2), change_2], dim=-1)


class Coupled(OutputPatch):
    """The coupling, on what an embedding returns."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self._coupling = (coupling,)  # in a tuple, so that it is no child: the delta owns it

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self._coupling[0](y)  # type: ignore[no-any-return]


class Uncoupled(InputPatch):
    """The inverse, on what an LM head is given."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self._coupling = (coupling,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self._coupling[0].inverse(x)


def _has_coupling(site: Site) -> bool:
    return site.has_matrix and site.leaf != "readout"


def _width(site: Site) -> int:
    return site.in_features if site.leaf == "lm_head" else site.out_features
