"""IA3: one vector a module, at its output, or at its input for ``feedforward_modules``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import (
    LAYERS,
    Content,
    Output,
    Placed,
    Recipe,
    SiteTuner,
    one_part,
    refuse_traits,
    stored_transposed,
    tuners,
)
from deltatune.errors import Unsupported
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.kinds import Method
from deltatune.structure.site import Site

VECTOR = "ia3_l"


class Ia3(SiteTuner):
    """IA3."""

    methods = (IA3,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        key: value
        for key, value in {**LAYERS, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True}.items()
        if not key.startswith("layers_")
    }

    def suffixes(self) -> frozenset[str]:
        """The vector."""
        return frozenset({VECTOR})

    def recipe(self, content: Content) -> Recipe:
        """One recipe; which side is scaled is seen from the tensors."""
        for key in ("feedforward_modules", "init_ia3_weights"):
            content.fields.data.pop(key, None)
        return lambda path, theirs: IA3()

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps and convolutions."""
        refuse_traits(site, method, "IA3", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(out, 1) at the output, (1, in) at the input, as a vector.

        Raises:
            Unsupported: PEFT scales the other side than we do.
        """
        vector = theirs[VECTOR]
        at_input = vector.shape[0] == 1 and vector.shape[-1] != 1
        if at_input != (site.leaf == "down"):
            ours, other = ("input", "output") if site.leaf == "down" else ("output", "input")
            raise Unsupported(
                f"IA3 at `{site.key}` (role {site.role}) scales the {ours} here, and PEFT's folder scales the {other} "
                "(feedforward_modules). Train it anew, or merge it with PEFT."
            )
        return {"l": vector.flatten()}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A row at the input, a column at the output."""
        return {VECTOR: ours["l"].view(1, -1) if site.leaf == "down" else ours["l"].view(-1, 1)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The modules that are scaled at their input."""
        output.config["feedforward_modules"] = sorted(path for path, place in placed.items() if place.site.leaf == "down")
        output.config["fan_in_fan_out"] = stored_transposed(placed)

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part."""
        return one_part("ia3", groups)


tuners.register("IA3")(Ia3())
