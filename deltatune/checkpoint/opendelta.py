"""OpenDelta's folders: ``config.json`` with a ``delta_type`` beside ``pytorch_model.bin``, a pickle of the backbone's own names.

A type of OpenDelta is one function here, registered under its ``delta_type``. Its tensors stand below the module they were
inserted at, ``<path>.lora.lora_A``; what else was unfrozen stands under its own name.

Not read: ``parallel_adapter``, whose file does not say which module its output is added to, and ``soft_prompt``, which
lengthens the outputs and moves the pooled position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Foreign, Format, Part, Reading, formats
from deltatune.checkpoint.foreign_files import Fields, read_json, read_weights, weights_file
from deltatune.checkpoint.foreign_shapes import (
    Tensors,
    activation,
    attentions,
    dense,
    one_reduction,
    prefix_part,
    products,
    rooted,
    through_mlp,
    unfrozen,
)
from deltatune.errors import CheckpointError, Unsupported, nearest
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.bottleneck import reduced
from deltatune.methods.addition.low_rank_adapter import LowRankAdapter
from deltatune.methods.addition.phm_adapter import PHMAdapter
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit
from deltatune.registry import Registry
from deltatune.structure.index import Index
from deltatune.structure.site import Site

CONFIG, PICKLE, SAFE = "config.json", "pytorch_model.bin", "model.safetensors"
HARMLESS = (
    "delta_type",
    "modified_modules",
    "exclude_modules",
    "unfrozen_modules",
    "common_structure",
    "backbone_class",
    "backbone_checkpoint_name",
    "backbone_hash",
    "backend",
    "opendelta_version",
    "transformers_version",
)
"""Where it was put, which the names of the tensors say, and what it was made on and with."""

INITIAL = ("phm_c_init", "hypercomplex_nonlinearity", "phm_init_range", "kronecker_prod", "sequential")
"""How it started, and two ways to compute one product."""


@dataclass(frozen=True)
class Content:
    """What a type reads from.

    Attributes:
        fields: of the config.
        tensors: of the file.
        sites: of the backbone.
    """

    fields: Fields
    tensors: Tensors
    sites: Index

    @property
    def file(self) -> Path:
        """The file of the tensors, for errors."""
        return self.tensors.file

    def matrix(self, path: str) -> Site:
        """The linear map that something was inserted at.

        Raises:
            CheckpointError: this backbone has no such module.
            Unsupported: it is none.
        """
        if path not in self.sites:
            raise CheckpointError(
                f"`{self.file}` sits at `{path}`, and this {type(self.sites.backbone).__name__} has no such module. "
                f"{nearest(path, [site.key for site in self.sites])} Load the backbone it was trained on."
            )
        site = self.sites[path]
        if not site.has_matrix:
            raise Unsupported(
                f"`{self.file}` sits behind `{path}` ({type(site.module).__name__}), which is no linear map; deltatune puts it behind "
                "linear maps. Train it anew at `attention.output` or `feed_forward.down`."
            )
        return site


types: Registry[Callable[[Content], Part]] = Registry("type of OpenDelta", "opendelta_types")
"""What reads a delta of a ``delta_type``."""


class OpenDeltaFormat(Format):
    """Folders that OpenDelta's ``save_finetuned`` wrote."""

    def recognises(self, folder: Path) -> bool:
        """Its config names a delta type."""
        file = folder / CONFIG
        try:
            return file.is_file() and "delta_type" in read_json(file)
        except CheckpointError:
            return False

    def read(self, folder: Path, sites: Index, reading: Reading) -> Foreign:
        """The delta, then what was unfrozen beside it."""
        config = read_json(folder / CONFIG)
        kind = config.get("delta_type")
        if not isinstance(kind, str) or kind not in types:
            raise Unsupported(
                f"`{folder / CONFIG}` has delta_type = {kind!r:.80}, which deltatune cannot read; it reads {', '.join(types)}. "
                "Train it anew here: `deltatune methods` lists what there is."
            )
        fields = Fields(config, folder / CONFIG, HARMLESS)
        file = weights_file(folder, SAFE, PICKLE, allow_bin=reading.allow_bin)
        content = Content(fields, Tensors(rooted(read_weights(file), sites), file), sites)
        delta = types[kind](content)
        beside, heads = unfrozen(content.tensors, sites)
        content.tensors.end(sites)
        fields.end(allow_unknown=reading.allow_unknown)
        name = config.get("backbone_checkpoint_name")
        return Foreign((delta, *beside), heads, name if isinstance(name, str) else None)


@types.register("lora")
def read_lora(content: Content) -> Part:
    """x A^T B^T * alpha / r beside a linear map."""
    fields = content.fields
    method = LoRA(fields.take("lora_r", 8), float(fields.take("lora_alpha", 16, int, float)), fields.take("lora_dropout", 0.0))
    found = content.tensors.take(r"(.+)\.lora\.(.+)")
    content.tensors.need(found, "LoRA")
    tensors = {}
    for path, group in found.items():
        names = {"lora_A": 2, "lora_B": 2}
        for name, tensor in zip(names, content.tensors.pick(group, path, names), strict=True):
            tensors[content.matrix(path).key, name] = tensor
    return Part("lora", method, tensors)


@types.register("adapter")
def read_adapter(content: Content) -> Part:
    """h + U f(D h) behind a module."""
    f = activation(content.fields.take("non_linearity", "gelu_new"), content.fields.file)
    method = Adapter(content.fields.take("bottleneck_dim", 24), f)
    found = content.tensors.take(r"(.+)\.adapter\.modulelist\.(.+)")
    content.tensors.need(found, "adapter")
    names = {"down_proj.weight": 2, "down_proj.bias": 1, "up_proj.weight": 2, "up_proj.bias": 1}
    tensors = {}
    for path, group in found.items():
        site = content.matrix(path)
        for name, tensor in dense(content.tensors.pick(group, path, names)).items():
            tensors[site.key, name] = tensor
    return Part("adapter", method, tensors)


@types.register("compacter")
def read_compacter(content: Content) -> Part:
    """An adapter of two maps sum_i A_i (x) (l_i r_i), each with a rule A of its own."""
    fields = content.fields
    n, reduction = fields.take("hypercomplex_division", 4), fields.take("reduction_factor", 16)
    f = activation(fields.take("non_linearity", "relu"), fields.file)
    for field in ("shared_phm_rule", "shared_W_phm", "factorized_phm_rule"):
        fields.refuse(field, why="OpenDelta itself never wrote it")
    for field in (*INITIAL, "bottleneck_dim", "learn_phm", "phm_rank", "use_bias_up_sampler", "use_bias_down_sampler"):
        fields.take(field, None, object, bool)
    fields.only_trains("factorized_phm")
    found = content.tensors.take(r"(.+)\.compactor\.(.+)")
    content.tensors.need(found, "Compacter")
    method = PHMAdapter(n, reduction, f)
    tensors = {}
    for path, group in found.items():
        site = content.matrix(path)
        if reduced(site.out_features, reduction, n) != site.out_features // reduction:
            one_reduction([(site.out_features, site.out_features // reduction)], n)
        for side, theirs in (("D", "down_sampler"), ("U", "up_sampler")):
            own = {name.removeprefix(f"{theirs}."): group.pop(name) for name in list(group) if name.startswith(f"{theirs}.")}
            for name, tensor in products(side, *_compact(content, own, f"{path}.compactor.{theirs}")).items():
                tensors[site.key, name] = tensor
        content.tensors.pick(group, path, {})
    return Part("compacter", method, tensors)


def _compact(content: Content, group: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rule, left and right factors, bias; a product that is no product has the identity as its right factor."""
    if "W" in group:
        rule, W, b = content.tensors.pick(group, path, {"phm_rule": 3, "W": 3, "b": 1})
        return rule, W, torch.eye(W.shape[-1], dtype=W.dtype).expand(len(W), -1, -1), b
    rule, W_left, W_right, b = content.tensors.pick(group, path, {"phm_rule": 3, "W_left": 3, "W_right": 3, "b": 1})
    if W_left.shape[-1] != W_right.shape[-2] or len(W_left) != len(W_right):
        raise CheckpointError(f"`{content.file}`: the factors of `{path}` do not fit each other. Copy the folder again.")
    return rule, W_left, W_right, b


@types.register("low_rank_adapter")
def read_low_rank(content: Content) -> Part:
    """An adapter of two maps l r of rank 1, which OpenDelta multiplies elementwise."""
    fields = content.fields
    rank = fields.take("low_rank_rank", 1)
    if rank != 1:
        raise Unsupported(f"`{fields.file}` has low_rank_rank = {rank}, which OpenDelta itself cannot run. Train it anew here.")
    fields.take("low_rank_w_init", "")
    method = LowRankAdapter(fields.take("reduction_factor", 32), 1, activation(fields.take("non_linearity", "gelu_new"), fields.file))
    found = content.tensors.take(r"(.+)\.low_rank_adapter\.(.+)")
    content.tensors.need(found, "low-rank adapter")
    names = {f"{side}_sampler.{name}": dims for side in ("down", "up") for name, dims in (("W_left", 2), ("W_right", 2), ("b", 1))}
    tensors = {}
    for path, group in found.items():
        key = content.matrix(path).key
        picked = content.tensors.pick(group, path, names)
        for side, (W_left, W_right, b) in zip("DU", (picked[:3], picked[3:]), strict=True):
            for name, tensor in (("s", W_right.T), ("t", W_left), ("b", b)):
                tensors[key, f"bottleneck.{side}.{name}"] = tensor
    return Part("low_rank_adapter", method, tensors)


@types.register("bitfit")
def read_bitfit(content: Content) -> Part:
    """Biases under their own names, and those that were added where a module had none."""
    found = content.tensors.take(r"(.+)\.bitfit\.(bias)") | content.tensors.take(r"(.+)\.(bias)")
    content.tensors.need(found, "bias")
    tensors, heads = {}, {}
    readouts = [site.path for site in content.sites if site.leaf == "readout"]
    for path, group in found.items():
        [bias] = content.tensors.pick(group, path, {"bias": 1})
        if path not in content.sites:
            content.matrix(path)
        own = content.sites[path].module._parameters.get("bias")
        if any(f"{path}.".startswith(f"{head}.") for head in readouts) and f"{path}.weight" in content.tensors.left:
            heads[f"{path}.bias"] = bias
        else:
            tensors[path, "b" if own is None else "bias"] = bias
    content.tensors.left |= heads  # a head trains as a whole
    return Part("bitfit", BitFit(), tensors)


@types.register("prefix")
def read_prefix(content: Content) -> Part:
    """Keys and values ahead of those of attentions, as they are or as an MLP makes them."""
    fields = content.fields
    fields.take("prefix_token_num", 6)
    fields.take("embed_dim", 512)
    reparameterized, mid_dim = fields.take("reparameterize", True), fields.take("mid_dim", 512)
    if attentions(content.sites, "encoder.attention", "decoder.attention", "cross_attention", "decoder.cross_attention"):
        raise Unsupported(
            f"`{fields.file}` is a prefix for an encoder-decoder; there OpenDelta computes the position bias of every layer but the first "
            "anew, as zeros, so its outputs are none of T5's. Train it anew here: prefix-tuning."
        )
    made = _from_mlp(content) if reparameterized else _as_they_are(content)
    return prefix_part("prefix", made, mid_dim if reparameterized else None, content.file)


def _as_they_are(content: Content) -> list[tuple[Site, Tensor, Tensor]]:
    found = content.tensors.take(r"(.+)\.prefix\.(.+)")
    content.tensors.need(found, "prefix")
    made = []
    for path, group in found.items():
        keys, values = content.tensors.pick(group, path, {"past_key": 2, "past_value": 2})
        made.append((_attention(content, path), keys, values))
    return made


def _from_mlp(content: Content) -> list[tuple[Site, Tensor, Tensor]]:
    """One MLP makes the prefixes of all attentions, in the order of the backbone's modules."""
    found = content.tensors.take(r"(.+)\.reparams\.(.+)")
    content.tensors.need(found, "reparameterisation")
    [(path, group)] = found.items() if len(found) == 1 else [("reparams", {})]
    group.pop("input_tokens", None)
    names = {
        "wte.weight": 2,
        "control_trans.0.weight": 2,
        "control_trans.0.bias": 1,
        "control_trans.2.weight": 2,
        "control_trans.2.bias": 1,
    }
    made = through_mlp(content.tensors.pick(group, path, names))
    sites = attentions(content.sites, "attention")
    if not sites or _attention(content, path) != sites[0] or made.shape[1] % (2 * len(sites)):
        raise Unsupported(
            f"`{content.file}` makes {made.shape[1]} numbers a token from `{path}` on, not divisible among all {len(sites)} attentions "
            "of this backbone; which of them it belongs to is not in the file. Save it with reparameterize=False."
        )
    layers = made.view(made.shape[0], 2 * len(sites), -1).unbind(1)
    return [(site, layers[2 * k], layers[2 * k + 1]) for k, site in enumerate(sites)]


def _attention(content: Content, path: str) -> Site:
    """The attention that a prefix was inserted at: the module itself, or the one inside it."""
    inside = [site for site in attentions(content.sites, "attention") if f"{site.path}.".startswith(f"{path}.")]
    if len(inside) != 1:
        raise CheckpointError(
            f"`{content.file}` has a prefix at `{path}`, where this {type(content.sites.backbone).__name__} has {len(inside)} attentions. "
            "Load the backbone it was trained on."
        )
    return inside[0]


formats.register("opendelta")(OpenDeltaFormat())
