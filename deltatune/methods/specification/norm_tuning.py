"""Norm tuning: train the scales and shifts of the normalisations (Zhao et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@methods.register("norm-tuning")
@dataclass(frozen=True)
class NormTuning(Method):
    """y = gamma' * (x - mean) / std + beta' with gamma' and beta' trained in place, each (d,); RMSNorm has gamma alone.

    A site counts as a norm if all its own parameters are vectors; batch norms keep their running statistics.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("norm",)
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2312.11420"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """Scale and shift."""
        names = site.parameters
        vectors = all(site.module.get_parameter(name).ndim == 1 for name in names)
        return [SelectionPatch(name) for name in names] if vectors and site.parameter is None else []
