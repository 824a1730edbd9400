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
AT_INPUT, AT_OUTPUT = IA3(inputs=("",)), IA3(inputs=())
"""Stand for either side until all modules are known."""


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
        """Which side is scaled is seen from the tensors; ``gathered`` makes one recipe of it."""
        for key in ("feedforward_modules", "init_ia3_weights"):
            content.fields.data.pop(key, None)
        return lambda path, theirs: AT_INPUT if len(theirs[VECTOR]) == 1 and theirs[VECTOR].shape[-1] != 1 else AT_OUTPUT

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps and convolutions."""
        refuse_traits(site, method, "IA3", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(out, 1) at the output, (1, in) at the input, as a vector."""
        return {"l": theirs[VECTOR].flatten()}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A row at the input, a column at the output."""
        assert isinstance(method, IA3)
        return {VECTOR: ours["l"].view(1, -1) if site.leaf in method.inputs else ours["l"].view(-1, 1)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The modules that are scaled at their input."""
        output.config["feedforward_modules"] = sorted(path for path, place in placed.items() if len(place.theirs[VECTOR]) == 1)
        output.config["fan_in_fan_out"] = stored_transposed(placed)

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part, whose roles say which side is scaled.

        Raises:
            Unsupported: PEFT scales both sides of modules of one role, or the input of one without a role.
        """
        at_input, at_output = (
            {site.leaf: site.key for site in content.modules.sites if site.key in {key for key, _ in groups.get(method, {})}}
            for method in (AT_INPUT, AT_OUTPUT)
        )
        unclear = [at_input[leaf] for leaf in at_input if not leaf or leaf in at_output]
        if unclear:
            raise Unsupported(
                f"`{content.stored.file}` scales the input of `{unclear[0]}` (feedforward_modules), and the output of others of its role, "
                "or it has no role; our IA3 goes by roles. Train it anew, or merge it with PEFT."
            )
        inputs = {"down", *at_input} - at_output.keys()
        tensors = {key: tensor for found in groups.values() for key, tensor in found.items()}
        return one_part("ia3", {IA3(inputs=tuple(sorted(inputs))): tensors})


tuners.register("IA3")(Ia3())
