"""SHIRA: values at fixed random places of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import Content, Output, Placed, Recipe, SiteTuner, one_part, only, refuse_traits, tuners
from deltatune.errors import Unsupported
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.shira import SHiRA
from deltatune.structure.site import Site

VALUES, PLACES = "shira_weight", "shira_indices"


class Shira(SiteTuner):
    """SHIRA."""

    methods = (SHiRA,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        "fan_in_fan_out": False,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": None,
        "r": 32,
        "random_seed": None,
        "target_modules": None,
    }

    def suffixes(self) -> frozenset[str]:
        """Values and their places."""
        return frozenset({VALUES, PLACES})

    def recipe(self, content: Content) -> Recipe:
        """SHiRA, whose places come from the seed."""
        fields = content.fields
        fields.data.pop("init_weights", None)
        fields.refuse("mask_type", "random", why="our places are random")
        method = SHiRA(rank=fields.take("r", 32), seed=fields.take("random_seed", 0))
        return lambda path, theirs: method

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps."""
        refuse_traits(site, method, "SHIRA", "transposed", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values; their places must be those of the seed.

        Raises:
            Unsupported: they are not, as where PEFT drew without one.
        """
        places = theirs.get(PLACES)
        if places is not None and not torch.equal(places.long(), _places(site, method).long()):
            raise Unsupported(
                f"The places of SHIRA at `{site.key}` are not those of {method}: PEFT drew them without a `random_seed`, or by another "
                "mask. Convert it with PEFT to LoRA, or merge it."
            )
        return {"values": theirs[VALUES]}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values and their places, (2, k)."""
        return {VALUES: ours["values"], PLACES: _places(site, method)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Rank and seed."""
        method = only((place.method for place in placed.values()), "SHiRA")
        assert isinstance(method, SHiRA)
        output.config |= {"r": method.rank, "random_seed": method.seed}

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part."""
        return one_part("shira", groups)


def _places(site: Site, method: Method) -> Tensor:
    """Rows and columns of the places, (2, k)."""
    [patch] = method.build(site, None)
    flat = patch.get_buffer("index")
    width = site.in_features
    return torch.stack([flat // width, flat % width]).to(torch.int32)


tuners.register("SHIRA")(Shira())
