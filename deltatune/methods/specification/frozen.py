"""Frozen: nothing trains, the control below every method (Ding et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("frozen")
@dataclass(frozen=True)
class Frozen(Method):
    """Theta' = Theta, |delta| = 0: what the backbone scores as it is.

    A fresh task head stays as it was drawn, and its file holds it, so that what was scored can be scored again; scored by
    label words, the backbone is measured zero-shot.
    """

    family: ClassVar[Family] = "baseline"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("*",)
    trains: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv:2203.06904"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """No patches, wherever."""
        return []
