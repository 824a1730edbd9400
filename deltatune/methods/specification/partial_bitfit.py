"""Partial BitFit: train two kinds of biases, about half of them (Ben Zaken et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.specification.bitfit import biases_of
from deltatune.structure.site import Site


@methods.register("partial-bitfit")
@dataclass(frozen=True)
class PartialBitFit(Method):
    """b_q' = b_q + delta b_q and b_m2' = b_m2 + delta b_m2: the queries and the feed-forward's first map, d -> 4 d.

    These two kinds of biases move most in training, and fixing either costs much. Other kinds by ``where``, such as
    ``attention.value`` or ``norm``; the key's cannot change anything, since softmax does not see it.

    Args:
        add_missing: add zero biases where a module has none.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "feed_forward.up?")
    learning_rate: ClassVar[float] = 2e-3
    source: ClassVar[str] = "arXiv:2106.10199"

    add_missing: bool = True

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The biases of the site, or an added one."""
        return biases_of(site, self.add_missing)
