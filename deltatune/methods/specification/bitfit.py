"""BitFit: train the biases (Ben Zaken et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@methods.register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """b' = b + delta b for every bias b: W, LayerNorm scales and embeddings stay.

    Trains the biases in place, those of LayerNorms included. A linear map without one gets a bias of zeros added to
    its output (``add_missing``), so that models without biases (T5, Llama) can be tuned; outputs do not change. Of a
    fused projection, one role's share of b cannot train in place, so delta b is added to the output.

    Args:
        add_missing: add zero biases where a linear map has none.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2106.10199"

    add_missing: bool = True

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The biases of the site, or an added one."""
        biases = [name for name in site.parameters if name.rpartition(".")[2].endswith("bias")]
        if biases and site.rows is None:
            return [SelectionPatch(name) for name in biases]
        plain = site.is_linear and site.reached and site.parameter is None and site.leaf not in ("lm_head", "readout")
        adds = (self.add_missing or bool(biases)) and plain and not site.tied
        return [AddedBias(site.out_features)] if adds else []


class AddedBias(OutputPatch):
    """y + b, with b zero at the start."""

    commutes = "add"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return y + self.b.to(y.dtype)
