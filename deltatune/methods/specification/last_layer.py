"""Last-layer tuning: only the last layer trains; of a model with encoder and decoder, the encoder's (Ding et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import Site


@methods.register("last-layer")
@dataclass(frozen=True)
class LastLayer(Method):
    """theta_L' = theta_L + delta theta_L for all parameters of layer L, the last one; all other layers stay.

    Trains in place. Of an encoder-decoder model it is the last layer of the encoder, as in the survey's study of scale;
    ``last-layers`` takes both stacks.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("layer",)
    learning_rate: ClassVar[float] = 2e-4
    source: ClassVar[str] = "arXiv:2203.06904"

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """All parameters of the site, where it lies in the last layer."""
        is_last = in_last(site, 1) and site.layer_list is not None and site.layer_list.side != "decoder"
        return [SelectionPatch(name) for name in site.all_parameters] if is_last else []


def in_last(site: Site, count: int) -> bool:
    """Whether the site lies in one of the last ``count`` layers of its list."""
    return site.layer is not None and site.layer_list is not None and site.layer >= site.layer_list.depth - count
