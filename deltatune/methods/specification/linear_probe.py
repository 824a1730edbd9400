"""Linear probe: only the task head trains, on the frozen backbone's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@methods.register("linear-probe")
@dataclass(frozen=True)
class LinearProbe(Method):
    """logits = W h + b with h frozen: trains the readout, W: (labels, d) and b: (labels,), and nothing else."""

    family: ClassVar[Family] = "baseline"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("readout",)
    learning_rate: ClassVar[float] = 1e-2
    source: ClassVar[str] = "arXiv:1610.01644"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """All parameters of the head, at whatever depth."""
        return [SelectionPatch(name) for name in site.all_parameters]
