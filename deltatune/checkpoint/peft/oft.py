"""OFT: rotations of the inputs, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import LAYERS, Content, Output, Placed, Recipe, SiteTuner, one_part, only, refuse_traits, tuners
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.oft import OFT
from deltatune.structure.site import Site

ROTATION, TABLE_ROTATION = "oft_R.weight", "oft_embedding_R.weight"


class Oft(SiteTuner):
    """OFT."""

    methods = (OFT,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        **LAYERS,
        "bias": "none",
        "block_share": False,
        "coft": False,
        "eps": 6e-05,
        "fan_in_fan_out": False,
        "init_weights": True,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": 32,
        "r": 0,
        "use_cayley_neumann": True,
    }
    biased = "oft_only"

    def suffixes(self) -> frozenset[str]:
        """The upper triangles."""
        return frozenset({ROTATION, TABLE_ROTATION})

    def recipe(self, content: Content) -> Recipe:
        """The width of a block is seen from the tensors: b (b - 1) / 2 numbers each."""
        fields = content.fields
        fields.refuse("coft", why="our rotations are not kept near the identity")
        fields.only_trains("module_dropout")
        for key in ("r", "oft_block_size", "eps", "init_weights"):
            fields.data.pop(key, None)  # the tensors say the sizes; eps only counts with coft
        shared = fields.take("block_share", False)
        series, terms = fields.take("use_cayley_neumann", False), fields.take("num_cayley_neumann_terms", 5)
        if series and terms < 4:
            fields.data["num_cayley_neumann_terms"] = terms
            fields.refuse("num_cayley_neumann_terms", why="our series has at least 4 terms")

        def at(path: str, theirs: dict[str, Tensor]) -> Method:
            [upper] = theirs.values()
            size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
            return OFT(block_size=size, block_share=shared, neumann_terms=terms if series else None)

        return at

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps, embeddings, and convolutions in two dimensions, which it gets right for kernels of one."""
        refuse_traits(site, method, "OFT", "transposed", "1d", "3d", "wide kernel", "grouped", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same numbers."""
        [upper] = theirs.values()
        return {"rotation.Q": upper}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same numbers."""
        return {TABLE_ROTATION if isinstance(site.module, nn.Embedding) else ROTATION: ours["rotation.Q"]}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The block's width, which is the same everywhere."""
        method = only((place.method for place in placed.values()), "OFT")
        assert isinstance(method, OFT)
        series = {} if method.neumann_terms is None else {"num_cayley_neumann_terms": method.neumann_terms}
        output.config |= {
            "oft_block_size": method.block_size,
            "block_share": method.block_share,
            "use_cayley_neumann": bool(series),
            **series,
        }

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """A part per width of blocks: PEFT adapts it where ``r`` blocks are asked for."""
        return one_part("oft", groups)


tuners.register("OFT")(Oft())
