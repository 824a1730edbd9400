"""LORA: LoRA, rsLoRA, DoRA and PiSSA, on linear maps, convolutions, embeddings and raw parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_files import Fields
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tied import TABLE_A, TABLE_B, A, B, join_tied, spread_tied
from deltatune.checkpoint.peft.tuner import (
    Content,
    Output,
    Placed,
    Recipe,
    SiteTuner,
    commonest,
    one_part,
    only,
    patterns,
    refuse_traits,
    stored_transposed,
    tuners,
    whole,
)
from deltatune.errors import CheckpointError, Unsupported
from deltatune.methods.kinds import Method
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.reparameterization.lora_fa import LoRAFA
from deltatune.methods.reparameterization.lora_plus import LoRAPlus
from deltatune.methods.reparameterization.matrix_view import MatrixView
from deltatune.methods.reparameterization.pissa import PiSSA
from deltatune.structure.site import Site

B_BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"

LORA_FIELDS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""The fields of LORA, which ADALORA has, too."""

VARIANTS = {
    "alora_invocation_tokens": "the delta acts behind an invocation only",
    "arrow_config": "",
    "kasa_config": "",
    "layer_replication": "the backbone has other layers",
    "megatron_config": "",
    "monteclora_config": "",
    "use_bdlora": "",
    "use_qalora": "",
    "velora_config": "",
}
"""Fields of variants that we have no method for."""

STARTS = (True, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora")
"""Values of ``init_lora_weights`` that leave the backbone's weights alone, or as we can make them again."""

ALIKE = {"mica": "where lora_B does not train", "olora": "which is read as a LoRA of twice the rank"}
"""Those of them that our methods only compute, and would train otherwise."""

REBASED = (
    "it takes its start off the backbone's weights, and the file does not say what that was. Save it from PEFT with "
    "path_initial_model_for_weight_conversion, which writes a plain LoRA"
)
"""Why other values are refused."""


def refuse_variants(fields: Fields) -> None:
    """Refuse what our methods lack.

    Raises:
        Unsupported: such a field is set.
    """
    for key, why in VARIANTS.items():
        fields.refuse(key, why=why)
    for key in ("qalora_group_size", "loftq_config", "corda_config", "eva_config", "lora_ga_config"):
        fields.data.pop(key, None)  # they only count with what is refused, or at the start


@dataclass(frozen=True)
class Setting:
    """What a config says about one module.

    Attributes:
        alpha: the scale is alpha / rank, or alpha / sqrt(rank).
        dropout: on the input.
        rank_stabilized: rsLoRA.
        dora: DoRA.
    """

    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False

    def scale(self, rank: int) -> float:
        """s."""
        return self.alpha / (rank**0.5 if self.rank_stabilized else rank)


SETTINGS: dict[type[Method], Callable[[Any, int], Setting]] = {
    LoRA: lambda method, rank: Setting(method.alpha, method.dropout, method.rank_stabilized),
    LoRAPlus: lambda method, rank: Setting(method.alpha, method.dropout),
    LoRAFA: lambda method, rank: Setting(method.alpha, method.dropout),
    DoRA: lambda method, rank: Setting(method.alpha, 0.0, method.rank_stabilized, dora=True),
    PiSSA: lambda method, rank: Setting(float(rank), method.dropout),
}
"""Our method and PEFT's rank -> the setting."""


class Lora(SiteTuner):
    """LORA."""

    methods = (LoRA, LoRAPlus, LoRAFA, DoRA, PiSSA)
    prefix = TUNED
    fields = LORA_FIELDS
    biased = "lora_only"

    def suffixes(self) -> frozenset[str]:
        """Two factors, the bias of the second, and DoRA's magnitude."""
        return frozenset({A, B, B_BIAS, TABLE_A, TABLE_B, MAGNITUDE})

    def recipe(self, content: Content) -> Recipe:
        """LoRA, DoRA or PiSSA, of the rank and alpha that the patterns give a module."""
        fields = content.fields
        refuse_variants(fields)
        r, alpha = fields.take("r", 8), fields.take("lora_alpha", 8, int, float)
        ranks, alphas = fields.take_table("rank_pattern", int), fields.take_table("alpha_pattern", int, float)
        stable = fields.take("use_rslora", False)
        start = str(fields.peek("init_lora_weights"))
        fields.refuse("init_lora_weights", *STARTS, why=REBASED)
        biased = fields.take("lora_bias", False)
        make = _maker(fields, start, stable)
        if start in ALIKE:
            fields.lenient.append(f"init_lora_weights = {start!r}, {ALIKE[start]}")

        def at(path: str, theirs: dict[str, Tensor]) -> Method:
            value = content.expressions.value
            rank, scaled = value(ranks, path, r), float(value(alphas, path, alpha))
            method = make(rank, scaled)
            scale = Setting(scaled, rank_stabilized=stable).scale(rank)
            if biased != (B_BIAS in theirs):
                raise CheckpointError(f"`{content.stored.file}`: `{path}.{B_BIAS}` does not go with lora_bias = {biased}. Copy it again.")
            if biased:
                content.added[path] = scale * theirs.pop(B_BIAS)
            if start == "olora":
                _take_off(content.modules.site(path), theirs, rank)
                return make(2 * rank, scaled * (2**0.5 if stable else 2))
            if isinstance(method, PiSSA):  # has no scale of its own
                theirs[B] = theirs[B] * scale
            return method

        return at

    def check(self, site: Site, method: Method) -> None:
        """PEFT's A forgets dilation and padding modes, and adds the change of attentions twice."""
        tied = () if isinstance(method, LoRA | LoRAPlus | LoRAFA) else ("tied",)
        refuse_traits(site, method, "LORA", "grouped", "dilated", "padded otherwise", "attention", *tied)
        if isinstance(method, PiSSA) and isinstance(site.module, nn.Embedding):
            raise Unsupported(f"{method} at `{site.key}`: PEFT has no PiSSA for embeddings. Keep it in the native format.")

    def ours(self, site: Site, method: Method, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors as matrices, or as stacks of them for experts."""
        found = {}
        stack = MatrixView.of(site).stack
        for suffix, name in ((A, "lora_A"), (TABLE_A, "lora_A"), (B, "lora_B"), (TABLE_B, "lora_B"), (MAGNITUDE, "magnitude")):
            if suffix in theirs:
                found[name] = OURS[name](theirs[suffix], stack)
        return found

    def joined(self, stored: Iterable[Placed], content: Content) -> Iterable[Placed]:
        """The changes of one tied weight as one."""
        return join_tied(stored, content)

    def spread(self, place: Placed, output: Output) -> Iterable[Placed]:
        """The change of a tied weight at each of its modules."""
        return spread_tied(place, output)

    def theirs(self, site: Site, method: Method, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors in the shapes of PEFT's layers."""
        ours = dict(ours)
        if isinstance(method, LoRAFA):
            ours["lora_A"] = _frozen_A(method, site)
        if isinstance(method, PiSSA):
            ours = {
                "lora_A": torch.cat([ours["lora_A"], ours["start_A"]], -2),
                "lora_B": torch.cat([ours["lora_B"], -ours["start_B"]], -1),
            }
        is_table = isinstance(site.module, nn.Embedding) and site.parameter is None and not site.tied
        kernel = site.weight.shape[1:] if site.parameter is None and site.weight.ndim > 2 else None
        A_, B_ = _factors(ours["lora_A"], ours["lora_B"], kernel)
        found = {TABLE_A: A_, TABLE_B: B_} if is_table else {A: A_, B: B_}
        if "magnitude" in ours:
            magnitude = ours["magnitude"].flatten()
            found[MAGNITUDE] = magnitude if kernel is None else magnitude.view(1, -1, *(1,) * (len(kernel) - 1))
        return found

    def config(self, placed: Mapping[str, Placed], output: Output) -> None:
        """The commonest rank and alpha, and patterns for the others."""
        ranks = {path: _rank(place) for path, place in placed.items()}
        settings = {path: SETTINGS[type(place.method)](place.method, ranks[path]) for path, place in placed.items()}
        rest = only((replace(setting, alpha=0.0) for setting in settings.values()), "dropout, scale and kind of LoRA")
        if rest.dropout and "target_parameters" in output.config:
            raise Unsupported("PEFT's LoRA on raw parameters takes no dropout. Save in the native format, or set dropout=0.")
        alphas = {path: whole(setting.alpha) for path, setting in settings.items()}
        r, alpha = commonest(ranks), commonest(alphas)
        if not any(place.site.parameter or isinstance(place.site.module, nn.Embedding) for place in placed.values()):
            output.scales = {path: settings[path].scale(ranks[path]) for path in placed}
        output.config |= {
            "r": r,
            "lora_alpha": alpha,
            "ensure_weight_tying": any(place.site.tied for place in placed.values()),
            "lora_dropout": rest.dropout,
            "use_rslora": rest.rank_stabilized,
            "use_dora": rest.dora,
            "rank_pattern": patterns(ranks, r),
            "alpha_pattern": patterns(alphas, alpha),
            "fan_in_fan_out": stored_transposed(placed),
        }

    def gathered(self, groups: Mapping[Method, dict[tuple[str, str], Tensor]], content: Content) -> list[Part]:
        """LoRAs that differ in rank alone are one; of the others each is a part."""
        merged: dict[Method, dict[Method, dict[tuple[str, str], Tensor]]] = {}
        for method, tensors in groups.items():
            common = replace(method, rank=1) if isinstance(method, LoRA) else method
            merged.setdefault(common, {})[method] = tensors
        joined = {_with_ranks(found): {key: t for tensors in found.values() for key, t in tensors.items()} for found in merged.values()}
        parts = one_part("lora", joined)
        return [replace(part, built=("start_A", "start_B")) if isinstance(part.method, PiSSA) else part for part in parts]


def _maker(fields: Fields, start: str, stable: bool) -> Callable[[int, float], Method]:
    """(rank, alpha) -> the method a config stands for."""
    if fields.take("use_dora", False):
        if start in ("pissa", *ALIKE):
            raise Unsupported(f"`{fields.file}` has init_lora_weights = {start!r} with use_dora = True, which deltatune has no method for.")
        fields.only_trains("lora_dropout")
        return lambda rank, alpha: DoRA(rank=rank, alpha=alpha, rank_stabilized=stable)
    dropout = fields.take("lora_dropout", 0.0, float)
    if start == "pissa":
        return lambda rank, alpha: PiSSA(rank=rank, dropout=dropout)
    return lambda rank, alpha: LoRA(rank=rank, alpha=alpha, dropout=dropout, rank_stabilized=stable)


def _take_off(site: Site, theirs: dict[str, Tensor], rank: int) -> None:
    """OLoRA: PEFT counts from W - s Q_r R_r, with W = Q R, so the change of W is s (B A - Q_r R_r): a LoRA of twice the rank.

    Raises:
        Unsupported: the site is no linear map.
    """
    if not isinstance(site.module, nn.Linear):
        raise Unsupported(f"init_lora_weights = 'olora' at `{site.key}` ({type(site.module).__name__}): PEFT has it for linear maps alone.")
    Q, R = torch.linalg.qr(site.weight.detach().float())
    theirs[A] = torch.cat([theirs[A], R[:rank].to(theirs[A])], 0)
    theirs[B] = torch.cat([theirs[B], -Q[:, :rank].to(theirs[B])], 1)


def _with_ranks(found: Mapping[Method, Mapping[tuple[str, str], Tensor]]) -> Method:
    """The one method that stands for LoRAs of several ranks: the commonest rank, and ``ranks`` for other sites, longest path first."""
    if len(found) == 1:
        return next(iter(found))
    ranks = {key: method.rank for method, tensors in found.items() if isinstance(method, LoRA) for key, _ in tensors}
    rank = commonest(ranks)
    others = sorted(((key, own) for key, own in ranks.items() if own != rank), key=lambda pair: (-len(pair[0]), pair[0]))
    return replace(next(iter(found)), rank=rank, ranks=tuple(others))  # type: ignore[call-arg]


def _A(theirs: Tensor, stack: tuple[int, ...]) -> Tensor:
    """(r, in, *kernel) -> (r, in * kernel); (experts * r, in) -> (experts, r, in)."""
    return theirs.reshape(*stack, -1, theirs.shape[-1]) if stack else theirs.flatten(1)


def _B(theirs: Tensor, stack: tuple[int, ...]) -> Tensor:
    """(out, r, 1, ...) -> (out, r); PEFT lays the experts' out as (out, r * experts), the experts innermost."""
    if not stack:
        return theirs.flatten(1)
    return theirs.reshape(theirs.shape[0], -1, *stack).permute(2, 0, 1).contiguous()


OURS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "lora_A": _A,
    "lora_B": _B,
    "magnitude": lambda theirs, stack: theirs.reshape(-1, 1),
}
"""Our name -> (PEFT's tensor, the stack of a view) -> ours."""


def _factors(A_: Tensor, B_: Tensor, kernel: torch.Size | None) -> tuple[Tensor, Tensor]:
    """PEFT's factors from ours."""
    if A_.ndim == 3:
        return A_.flatten(0, 1), B_.permute(1, 2, 0).flatten(1)
    if kernel is None:
        return A_, B_
    return A_.view(-1, *kernel), B_.view(*B_.shape, *(1,) * (len(kernel) - 1))


def _rank(place: Placed) -> int:
    """PEFT's rank at one place."""
    experts = MatrixView.of(place.site).stack
    factor = place.theirs[A] if A in place.theirs else place.theirs[TABLE_A]
    return factor.shape[0] // (experts[0] if experts else 1)


def _frozen_A(method: LoRAFA, site: Site) -> Tensor:
    """A of LoRA-FA, which is drawn anew from its seed."""
    [patch] = method.build(site, None)
    factor: Tensor = patch.get_buffer("lora_A")
    return factor


tuners.register("LORA")(Lora())
