"""LOHA and LOKR: the types that PEFT took over from LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
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
    commonest,
    inverse,
    one_part,
    only,
    patterns,
    refuse_traits,
    renamed,
    traits,
    tuners,
    whole,
)
from deltatune.errors import CheckpointError, Unsupported
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.loha import LoHa
from deltatune.methods.reparameterization.lokr import LoKr
from deltatune.structure.site import Site

LYCORIS_FIELDS: Mapping[str, Any] = {
    **LAYERS,
    "alpha": 8,
    "alpha_pattern": {},
    "init_weights": True,
    "module_dropout": 0.0,
    "r": 8,
    "rank_dropout": 0.0,
    "rank_pattern": {},
    "use_effective_conv2d": False,
}

LOHA = {"A_1": "hada_w1_b", "B_1": "hada_w1_a", "A_2": "hada_w2_b", "B_2": "hada_w2_a"}
LOKR = {
    "kronecker.C": "lokr_w1",
    "kronecker.C_b": "lokr_w1_a",
    "kronecker.C_a": "lokr_w1_b",
    "kronecker.D": "lokr_w2",
    "kronecker.D_b": "lokr_w2_a",
    "kronecker.D_a": "lokr_w2_b",
}


CORES = {"hada_t1": ("hada_w1_a", "hada_w1_b"), "hada_t2": ("hada_w2_a", "hada_w2_b"), "lokr_t2": ("lokr_w2_a", "lokr_w2_b")}
"""The core of a convolution's change under ``use_effective_conv2d`` -> the factors of its outputs and of its inputs."""


def _sizes(content: Content) -> tuple[Any, Any]:
    """path -> rank, and path -> alpha; what only trains is noted."""
    fields = content.fields
    r, alpha = fields.take("r", 8), fields.take("alpha", 8, int, float)
    ranks, alphas = fields.take_table("rank_pattern", int), fields.take_table("alpha_pattern", int, float)
    fields.only_trains("rank_dropout")
    fields.only_trains("module_dropout")
    fields.data.pop("init_weights", None)
    if content.stored.paths(CORES.keys()):
        fields.lenient.append("use_effective_conv2d = True, whose three factors we have as two,")
    fields.data.pop("use_effective_conv2d", None)  # it counts for convolutions only
    value = content.expressions.value
    return lambda path: value(ranks, path, r), lambda path: float(value(alphas, path, alpha))


def _as_matrices(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change without cores: sum_ij a_io t_ijk b_jn is a^T: (out, r) times sum_j t_ijk b_jn: (r, in * kernel).

    Raises:
        CheckpointError: a core and its factors do not belong together.
    """
    found = dict(theirs)
    for core, (a, b) in CORES.items():
        if core not in found:
            continue
        t = found.pop(core)
        if not {a, b} <= found.keys() or t.ndim != 4 or found[a].ndim != 2 or found[b].ndim != 2 or t.shape[1] != len(found[b]):
            raise CheckpointError(f"`{core}` has no factors `{a}` and `{b}` that fit it. Copy or save the folder again.")
        found[b] = torch.einsum("ijkl,jn->inkl", t, found[b]).flatten(1)
        found[a] = found[a].T.contiguous()
    return found


def _set_sizes(placed: Mapping[str, Placed], output: Output) -> None:
    """The commonest rank and alpha, and patterns for the others."""
    methods: dict[str, Any] = {path: place.method for path, place in placed.items()}
    ranks = {path: method.rank for path, method in methods.items()}
    alphas = {path: whole(method.alpha) for path, method in methods.items()}
    r, alpha = commonest(ranks), commonest(alphas)
    output.config |= {"r": r, "alpha": alpha, "rank_pattern": patterns(ranks, r), "alpha_pattern": patterns(alphas, alpha)}


class Loha(SiteTuner):
    """LOHA."""

    methods = (LoHa,)
    prefix = TUNED
    fields = LYCORIS_FIELDS

    def suffixes(self) -> frozenset[str]:
        """Four factors."""
        return frozenset({*LOHA.values(), "hada_t1", "hada_t2"})

    def recipe(self, content: Content) -> Recipe:
        """LoHa of the rank and alpha that the patterns give a module."""
        rank, alpha = _sizes(content)
        return lambda path, theirs: LoHa(rank=rank(path), alpha=alpha(path))

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps and convolutions in one and two dimensions."""
        refuse_traits(site, method, "LOHA", "transposed", "embedding", "3d", "padded otherwise", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same matrices."""
        return renamed(_as_matrices(theirs), inverse(LOHA))

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same matrices."""
        return renamed(ours, LOHA)

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Ranks and alphas."""
        _set_sizes(placed, output)

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """A part per rank and alpha."""
        return one_part("loha", groups)


class Lokr(SiteTuner):
    """LOKR."""

    methods = (LoKr,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {**LYCORIS_FIELDS, "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False}

    def suffixes(self) -> frozenset[str]:
        """C and D, whole or as factors."""
        return frozenset({*LOKR.values(), "lokr_t2"})

    def recipe(self, content: Content) -> Recipe:
        """LoKr of the rank and alpha that the patterns give a module."""
        rank, alpha = _sizes(content)
        factor, both = content.fields.take("decompose_factor", -1), content.fields.take("decompose_both", False)
        content.fields.data.pop("rank_dropout_scale", None)  # it only counts with rank_dropout
        return lambda path, theirs: LoKr(rank=rank(path), alpha=alpha(path), factor=factor, factor_both=both)

    def check(self, site: Site, method: Method) -> None:
        """PEFT takes linear maps and convolutions in one and two dimensions."""
        refuse_traits(site, method, "LOKR", "transposed", "embedding", "3d", "padded otherwise", "attention", "tied")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A convolution's whole D as a matrix."""
        _check_line(site, theirs)
        return renamed({name: tensor.flatten(1) for name, tensor in _as_matrices(theirs).items()}, inverse(LOKR))

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A convolution's whole D with its kernel."""
        found = renamed(ours, LOKR)
        _check_line(site, found)
        kernel = site.weight.shape[2:]
        if "lokr_w2" in found and kernel:
            found["lokr_w2"] = found["lokr_w2"].reshape(len(found["lokr_w2"]), -1, *kernel)
        return found

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """Ranks, alphas and how the sizes are split."""
        _set_sizes(placed, output)
        methods: list[Any] = [place.method for place in placed.values()]
        output.config["decompose_factor"] = only((method.factor for method in methods), "decompose_factor")
        output.config["decompose_both"] = only((method.factor_both for method in methods), "decompose_both")

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """A part per rank and alpha."""
        return one_part("lokr", groups)


def _check_line(site: Site, theirs: Mapping[str, Tensor]) -> None:
    if {"convolution", "1d"} <= traits(site) and "lokr_w2" in theirs:
        raise Unsupported(
            f"LoKr at `{site.key}` is not PEFT's LOKR: PEFT multiplies the wrong axes of a whole second factor of a Conv1d. "
            "Choose a smaller rank, or keep it in the native format."
        )


tuners.register("LOHA")(Loha())
tuners.register("LOKR")(Lokr())
