"""BitFit: train the biases (Ben Zaken et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, SelectionPatch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.structure.site import Site


@methods.register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """b' = b + delta b for every bias b: W, LayerNorm scales and embeddings stay.

    Trains the biases in place, those of LayerNorms included. A linear map, convolution or norm without one gets a bias
    of zeros added to its output (``add_missing``), so that models without biases (T5, Llama) can be tuned; outputs do not
    change. Such a bias has no place in the backbone, so it does not merge. Of a fused projection, one role's share of b
    cannot train in place, so delta b is added to those rows.

    Args:
        add_missing: add zero biases where a module has none.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2106.10199"

    add_missing: bool = True

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The biases of the site, or an added one."""
        return biases_of(site, self.add_missing)


def biases_of(site: Site, add_missing: bool) -> Sequence[Patch]:
    """The patches that tune the biases of one site."""
    if site.rows is not None:
        name = f"{(site.parameter or 'weight').removesuffix('weight')}bias"
        if site.module._parameters.get(name) is not None:
            return [BiasRows(name, site.out_features)]
    else:
        biases = [name for name in site.parameters if name.rpartition(".")[2].endswith("bias")]
        if biases:
            return [SelectionPatch(name) for name in biases]
    width = _missing(site) if add_missing else None
    return [] if width is None else [AddedBias(width)]


def _missing(site: Site) -> int | None:
    """Width of the bias that the site's module lacks; None where it can have none of its own."""
    if not site.reached or site.parameter is not None or site.tied or site.leaf in ("lm_head", "readout"):
        return None
    if site.is_linear or isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return site.out_features
    return site.weight.shape[0] if site.leaf == "norm" and "weight" in site.parameters else None


class AddedBias(OutputPatch):
    """y + b, with b zero at the start."""

    commutes = "add"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return y + self.b.to(y.dtype)

    def lane(self) -> Lane:
        """The bias."""
        return Lane("shift", {"b": self.b})


class BiasRows(WeightPatch):
    """b + delta b on the rows of one role of a fused projection, with delta b zero at the start."""

    commutes = "add"

    def __init__(self, parameter: str, width: int) -> None:
        super().__init__()
        self.parameter = parameter
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, theta: Tensor) -> Tensor:
        """(width,) -> (width,)."""
        return theta + self.b.to(theta.dtype)
