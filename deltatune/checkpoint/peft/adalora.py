"""ADALORA: singular triplets, all of them or what pruning left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.lora import LORA_FIELDS, refuse_variants
from deltatune.checkpoint.peft.tuner import (
    Content,
    Output,
    Placed,
    Recipe,
    SiteTuner,
    inverse,
    one_part,
    only,
    refuse_traits,
    renamed,
    stored_transposed,
    tuners,
    whole,
)
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.adalora import AdaLoRA
from deltatune.structure.site import Site

NAMES = {"triplets.P": "lora_B", "triplets.Lambda": "lora_E", "triplets.Q": "lora_A"}


class Adalora(SiteTuner):
    """ADALORA."""

    methods = (AdaLoRA,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        **LORA_FIELDS,
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "init_r": 12,
        "orth_reg_weight": 0.5,
        "rank_pattern": None,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
        "total_step": None,
    }
    biased = "lora_only"

    def suffixes(self) -> frozenset[str]:
        """P, Lambda and Q."""
        return frozenset(NAMES.values())

    def recipe(self, content: Content) -> Recipe:
        """AdaLoRA with the schedule as shares of the steps; the scale is alpha / init_r, pruned or not."""
        fields = content.fields
        refuse_variants(fields)
        for key in ("r", "rank_pattern", "init_lora_weights", "use_rslora"):
            fields.data.pop(key, None)  # PEFT's AdaLoRA has its own ranks and scale, and the tensors say how many triplets are left
        for key in ("use_dora", "alpha_pattern", "target_parameters", "lora_bias"):
            fields.refuse(key)
        fields.only_trains("lora_dropout")
        fields.only_trains("deltaT", 1)
        initial = fields.take("init_r", 12)
        total, warm, final = fields.take("total_step", 0), fields.take("tinit", 0), fields.take("tfinal", 0)
        method = AdaLoRA(
            rank=min(fields.take("target_r", 8), initial),
            initial_rank=initial,
            alpha=float(fields.take("lora_alpha", 8, int, float)),
            orthogonality=fields.take("orth_reg_weight", 0.5, float),
            beta1=fields.take("beta1", 0.85, float),
            beta2=fields.take("beta2", 0.85, float),
        )
        if total and warm + final < total:
            method = replace(method, warmup_share=warm / total, final_share=final / total)
        return lambda path, theirs: method

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps and convolutions in two dimensions."""
        refuse_traits(site, method, "ADALORA", "embedding", "grouped", "1d", "3d", "attention", "tied", "padded otherwise")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lambda without its second axis."""
        found = renamed(theirs, inverse(NAMES))
        return {name: tensor.flatten() if name == "triplets.Lambda" else tensor for name, tensor in found.items()}

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The triplets that act: in training, those that are chosen have their Lambda, all others zero."""
        found = renamed({name: ours[name] for name in NAMES}, NAMES)
        return {**found, "lora_E": found["lora_E"].unsqueeze(-1)}

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The schedule, with a thousand steps; which triplets were pruned is not known any more, and PEFT only counts them."""
        method = only((place.method for place in placed.values()), "AdaLoRA")
        assert isinstance(method, AdaLoRA)
        r, kept = method.initial_rank, {path: len(place.theirs["lora_E"]) for path, place in placed.items()}
        pattern = {f"{path}.lora_E": [k < count for k in range(r)] for path, count in kept.items()}
        pruned = any(count != r for count in kept.values())
        output.config |= {
            "init_r": r,
            "target_r": method.rank,
            "lora_alpha": whole(method.alpha),
            "orth_reg_weight": method.orthogonality,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "tinit": round(1000 * method.warmup_share),
            "tfinal": round(1000 * method.final_share),
            "total_step": 1000,
            "rank_pattern": pattern if pruned else None,
            "fan_in_fan_out": stored_transposed(placed),
        }

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """The final form: importance is not stored."""
        return [replace(part, exported=True) for part in one_part("adalora", groups)]


tuners.register("ADALORA")(Adalora())
