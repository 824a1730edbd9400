"""HIRA: the weight times one plus a low-rank matrix, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

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
    only,
    refuse_traits,
    stored_transposed,
    tuners,
)
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.hira import HiRA
from deltatune.structure.site import Site


class Hira(SiteTuner):
    """HIRA."""

    methods = (HiRA,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        **LAYERS,
        "fan_in_fan_out": False,
        "hira_dropout": 0.0,
        "init_weights": True,
        "r": 32,
        "rank_pattern": {},
    }

    def suffixes(self) -> frozenset[str]:
        """Two factors."""
        return frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"})

    def recipe(self, content: Content) -> Recipe:
        """HiRA of the rank that the tensors have: PEFT writes ``rank_pattern`` and gives every module ``r``."""
        for key in ("r", "rank_pattern", "init_weights"):
            content.fields.data.pop(key, None)
        content.fields.only_trains("hira_dropout")
        return lambda path, theirs: HiRA(rank=min(len(tensor) for name, tensor in theirs.items() if name.endswith("_A")))

    def check(self, site: Site, method: Method) -> None:
        """PEFT refuses grouped convolutions, and pads with zeros."""
        refuse_traits(site, method, "HIRA", "grouped", "padded otherwise", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors as matrices; PEFT sees a table as (width, rows), so that its A is our B."""
        if isinstance(site.module, nn.Embedding):
            return {"hira_A": theirs["hira_embedding_B"].T.contiguous(), "hira_B": theirs["hira_embedding_A"].T.contiguous()}
        return {name: tensor.flatten(1) for name, tensor in theirs.items()}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors in the shapes of PEFT's layers."""
        if isinstance(site.module, nn.Embedding):
            return {"hira_embedding_A": ours["hira_B"].T, "hira_embedding_B": ours["hira_A"].T}
        kernel = site.weight.shape[1:]
        if len(kernel) < 2:
            return dict(ours)
        ones = (1,) * (len(kernel) - 1)
        return {"hira_A": ours["hira_A"].view(-1, *kernel), "hira_B": ours["hira_B"].view(*ours["hira_B"].shape, *ones)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The rank, which PEFT has once for all modules."""
        r = only((place.method.rank for place in placed.values() if isinstance(place.method, HiRA)), "rank of HiRA")
        output.config |= {"r": r, "fan_in_fan_out": stored_transposed(placed)}

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """A part per rank."""
        return one_part("hira", groups)


tuners.register("HIRA")(Hira())
