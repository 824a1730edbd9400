"""VERA: two vectors a module around random matrices that all modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import ROOT, TUNED
from deltatune.checkpoint.peft.tuner import (
    LAYERS,
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
)
from deltatune.errors import Unsupported
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.vera import Bases, VeRA
from deltatune.structure.site import Site

NAMES = {"b": "vera_lambda_b", "d": "vera_lambda_d"}


class Vera(SiteTuner):
    """VERA."""

    methods = (VeRA,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {
        key: value
        for key, value in {
            **LAYERS,
            "bias": "none",
            "d_initial": 0.1,
            "fan_in_fan_out": False,
            "init_weights": True,
            "projection_prng_key": 0,
            "r": 256,
            "save_projection": True,
            "vera_dropout": 0.0,
        }.items()
        if key != "exclude_modules"
    }
    biased = "vera_only"

    def suffixes(self) -> frozenset[str]:
        """b and d."""
        return frozenset(NAMES.values())

    def recipe(self, content: Content) -> Recipe:
        """A and B come from the seed, as in PEFT."""
        fields = content.fields
        for key in ("save_projection", "init_weights"):
            fields.data.pop(key, None)
        start = fields.take("d_initial", 0.1, float)
        method = VeRA(
            rank=fields.take("r", 256),
            d_init=start if start > 0 else 0.1,  # what trained stands in the file
            dropout=fields.take("vera_dropout", 0.0, float),
            seed=fields.take("projection_prng_key", 0),
        )
        return lambda path, theirs: method

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps."""
        refuse_traits(site, method, "VERA", "embedding", "convolution", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same vectors."""
        return renamed(theirs, inverse(NAMES))

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same vectors."""
        return renamed(ours, NAMES)

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The seed; A and B themselves go into the file, too, as PEFT has it by default."""
        method = only((place.method for place in placed.values()), "VeRA")
        assert isinstance(method, VeRA)
        output.config |= {
            "r": method.rank,
            "d_initial": method.d_init,
            "vera_dropout": method.dropout,
            "projection_prng_key": method.seed,
            "fan_in_fan_out": stored_transposed(placed),
        }
        bases = _bases(method, [place.site for place in placed.values()])
        output.tensors |= {f"{ROOT}vera_A": bases.A, f"{ROOT}vera_B": bases.B}

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """One part; stored matrices must be those of the seed.

        Raises:
            Unsupported: they are not, as from another generator of random numbers.
        """
        [(method, tensors)] = groups.items()
        assert isinstance(method, VeRA)
        sites = [site for site in content.modules.sites if site.key in {key for key, _ in tensors}]
        own = _bases(method, sites)
        for name, base in (("vera_A", own.A), ("vera_B", own.B)):
            stored = content.stored.take_shared(name)
            if stored is not None and not torch.equal(stored.to(base.dtype), base):
                raise Unsupported(
                    f"`{content.stored.file}` stores a `{name}` of shape {tuple(stored.shape)} that projection_prng_key = {method.seed} "
                    f"does not make here for these modules, {tuple(base.shape)}. Convert it with PEFT to LoRA, or merge it."
                )
        return one_part("vera", groups)


def _bases(method: VeRA, sites: Sequence[Site]) -> Bases:
    found = method.share(sites)
    assert isinstance(found, Bases)
    return found


tuners.register("VERA")(Vera())
