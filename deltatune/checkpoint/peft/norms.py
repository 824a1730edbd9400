"""LN_TUNING: scales and shifts of norms, stored by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import LAYERS, Content, Output, Placed, Recipe, SiteTuner, inverse, one_part, renamed, tuners
from deltatune.methods.kinds import Method
from deltatune.methods.specification.norm_tuning import NormTuning
from deltatune.structure.site import Site

NAMES = {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}


class Norms(SiteTuner):
    """LN_TUNING."""

    methods = (NormTuning,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {key: value for key, value in LAYERS.items() if not key.startswith("layers_")}
    selects = True

    def suffixes(self) -> frozenset[str]:
        """Scale and shift."""
        return frozenset(NAMES.values())

    def recipe(self, content: Content) -> Recipe:
        """There is nothing to set."""
        return lambda path, theirs: NormTuning()

    def check(self, site: Site, method: Method) -> None:
        """PEFT copies whatever module it is given."""

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same vectors."""
        return renamed(theirs, inverse(NAMES))

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same vectors."""
        return renamed(ours, NAMES)

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """There is nothing to set."""

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part."""
        return one_part("norms", groups)


tuners.register("LN_TUNING")(Norms())
