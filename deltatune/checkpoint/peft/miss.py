"""MISS: one small matrix shared by all shards of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import LAYERS, Content, Output, Placed, Recipe, SiteTuner, one_part, only, refuse_traits, tuners
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.miss import MiSS
from deltatune.structure.site import Site


class Miss(SiteTuner):
    """MISS."""

    methods = (MiSS,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {**LAYERS, "bias": "none", "init_weights": True, "mini_r": 1, "miss_dropout": 0.0, "r": 64}
    biased = "MiSS_only"

    def suffixes(self) -> frozenset[str]:
        """The shard."""
        return frozenset({"miss_block"})

    def recipe(self, content: Content) -> Recipe:
        """MiSS, with narrow shards where ``init_weights`` is ``mini``."""
        fields = content.fields
        mini, width = fields.peek("init_weights") == "mini", fields.take("mini_r", 1)
        fields.refuse("init_weights", True, "mini", why="our MiSS has no block-affine form")
        method = MiSS(rank=fields.take("r", 64), dropout=fields.take("miss_dropout", 0.0, float), mini_rank=width if mini else None)
        return lambda path, theirs: method

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps."""
        refuse_traits(site, method, "MISS", "transposed", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same matrix."""
        return {"shard.D": theirs["miss_block"]}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same matrix."""
        return {"miss_block": ours["shard.D"]}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Rank, and the width of narrow shards."""
        method = only((place.method for place in placed.values()), "MiSS")
        assert isinstance(method, MiSS)
        mini = {} if method.mini_rank is None else {"init_weights": "mini", "mini_r": method.mini_rank}
        output.config |= {"r": method.rank, "miss_dropout": method.dropout, **mini}

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part."""
        return one_part("miss", groups)


tuners.register("MISS")(Miss())
