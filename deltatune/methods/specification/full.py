"""Full fine-tuning as a delta: the baseline every method is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@methods.register("full")
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Theta' = Theta + delta with |delta| = |Theta|: every parameter of the matched sites trains in place.

    It costs nothing extra per step. The originals are kept, so memory holds the backbone twice.
    """

    family: ClassVar[Family] = "baseline"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-4
    source: ClassVar[str] = "arXiv:1810.04805"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """All parameters of the site."""
        return [SelectionPatch(name) for name in site.parameters]
