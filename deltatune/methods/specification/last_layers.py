"""Last-layers tuning: the last share of the layers trains, by default a quarter of them (Lee et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.checks import proportion
from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.methods.specification.last_layer import in_last
from deltatune.structure.site import Site


@methods.register("last-layers")
@dataclass(frozen=True)
class LastLayers(Method):
    """theta_l' = theta_l + delta theta_l for all parameters of the layers l > L - n, n = portion * L rounded up; others stay.

    Trains in place; of an encoder-decoder model, the last layers of both stacks. A quarter reaches about nine tenths of
    what full fine-tuning gains.

    Args:
        portion: share of the layers, in (0, 1].

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("layer",)
    learning_rate: ClassVar[float] = 1e-4
    source: ClassVar[str] = "arXiv:1911.03090"

    portion: float = 0.25

    def __post_init__(self) -> None:
        proportion(self, "portion")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """All parameters of the site, where it lies in the last layers."""
        if site.layer_list is None or not in_last(site, math.ceil(self.portion * site.layer_list.depth)):
            return []
        return [SelectionPatch(name) for name in site.all_parameters]
