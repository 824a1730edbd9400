"""SHIRA: values at fixed random places of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import Content, Output, Placed, Recipe, SiteTuner, one_part, only, refuse_traits, tuners
from deltatune.errors import CheckpointError
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
        """SHiRA; its places come from the seed, or from the file where they are others."""
        fields = content.fields
        for key in ("init_weights", "mask_type"):
            fields.data.pop(key, None)  # the file says the places
        rank, seed = fields.take("r", 32), fields.take("random_seed", None, int)

        def at(path: str, theirs: dict[str, Tensor]) -> Method:
            seeded = SHiRA(rank=rank, seed=seed)
            if seed is None or PLACES not in theirs:
                return seeded
            own = _indices(seeded.build(content.modules.site(path), None)[0].get_buffer("index"), content.modules.site(path))
            return seeded if torch.equal(theirs[PLACES].to(own.dtype), own) else SHiRA(rank=rank, seed=None)

        return at

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps."""
        refuse_traits(site, method, "SHIRA", "transposed", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values, and their places where no seed makes them.

        Raises:
            CheckpointError: a place is outside the weight, or they are missing.
        """
        assert isinstance(method, SHiRA)
        if method.seed is not None:
            return {"values": theirs[VALUES]}
        places = theirs.get(PLACES)
        shape = torch.tensor([[site.out_features], [site.in_features]])
        if places is None or places.ndim != 2 or len(places) != 2 or bool((places < 0).any() or (places.long() >= shape).any()):
            raise CheckpointError(f"The places of SHIRA at `{site.key}` are missing or outside the weight. Copy or save it again.")
        rows, columns = places.long()
        return {"values": theirs[VALUES], "index": rows * site.in_features + columns}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values and their places, (2, k)."""
        index = ours["index"] if "index" in ours else method.build(site, None)[0].get_buffer("index")
        return {VALUES: ours["values"], PLACES: _indices(index, site)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Rank and seed."""
        method = only((place.method for place in placed.values()), "SHiRA")
        assert isinstance(method, SHiRA)
        output.config |= {"r": method.rank, "random_seed": method.seed}

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part."""
        return one_part("shira", groups)


def _indices(index: Tensor, site: Site) -> Tensor:
    """Rows and columns of flat places, (2, k)."""
    return torch.stack([index // site.in_features, index % site.in_features]).to(torch.int32)


tuners.register("SHIRA")(Shira())
