"""The adapters library's folders: ``adapter_config.json`` beside ``pytorch_adapter.bin`` or ``adapter.safetensors``, and a head.

An architecture of its configs is one function here, registered under its name. Its tensors carry the adapter's name within
their own: ``<path>.loras.<name>.lora_A``. A union of configs becomes several parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Foreign, Format, Part, Reading, formats
from deltatune.checkpoint.foreign_files import Fields, read_json, read_weights, weights_file
from deltatune.checkpoint.foreign_shapes import (
    Tensors,
    activation,
    attentions,
    below,
    dense,
    factors,
    one_reduction,
    prefix_part,
    products,
    rooted,
    through_mlp,
    unfrozen,
)
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError, Unsupported
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.compacter import Compacter
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.phm_adapter import PHMAdapter
from deltatune.methods.addition.scaled_parallel_adapter import ScaledParallelAdapter
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.registry import Registry
from deltatune.structure.index import Index
from deltatune.structure.site import Site

CONFIG, SAFE, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_SAFE, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
HARMLESS = (
    "architecture",
    "init_weights",
    "init_weights_seed",
    "phm_c_init",
    "phm_init_range",
    "hypercomplex_nonlinearity",
    "dtype",
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "selfattn_lora",
    "intermediate_lora",
    "output_lora",
    "inv_adapter_reduction_factor",
)
"""How it started, and where it was put, which the names of the tensors say."""

CONTAINERS = "adapters|loras|prefix_tunings|prefix_gates|shared_parameters|refts|prompt_tunings|invertible_adapters"
"""Modules of the library that hold what its adapters are made of."""

RIGHTLY_SCALED = (1, 1, 0)
"""The release from which on LoRA's alpha / r is applied; older ones trained with a scale of 1."""

AFTER_THE_NORM = frozenset({"bert", "roberta", "xlm-roberta", "electra", "distilbert", "bert-generation", "xmod", "deberta", "deberta-v2"})
"""Model types whose residual is what the sub-layer's first projection is given; elsewhere a norm stands between."""

GLUED = {
    "attention_adapters": ("attention", "output"),
    "output_adapters": ("", "down"),
    "cross_attention_adapters": ("cross_attention", "output"),
}
"""Modules that the library adds to a layer -> the sub-layer they act behind, and the last word of its last projection's role."""

PREFIXES = {
    "encoder_prefix": ("encoder.attention",),
    "self_prefix": ("attention", "decoder.attention"),
    "cross_prefix": ("cross_attention", "decoder.cross_attention"),
}
"""Groups of prefixes -> roles of their attentions."""


@dataclass(frozen=True)
class Content:
    """What an architecture reads from.

    Attributes:
        fields: of its config.
        tensors: of the file.
        sites: of the backbone.
        name: of the adapter, as it stands in the tensors' names.
        model_type: of the backbone it was trained on.
        version: of the library.
    """

    fields: Fields
    tensors: Tensors
    sites: Index
    name: str
    model_type: str
    version: tuple[int, ...]

    def modules(self, container: str) -> dict[str, dict[str, Tensor]]:
        """Path -> name -> tensor, of what stands in a container of the library: ``<path>.<container>.<name>.<rest>``."""
        return self.tensors.take(rf"((?:.+(?=\.{container}\.))?)\.?{container}\.{re.escape(self.name)}\.(.+)")

    def site(self, path: str, leaf: str | None = None) -> Site:
        """The site of a module, or of one role of a fused one.

        Raises:
            CheckpointError: this backbone has none there.
        """
        key = path if leaf is None else f"{path}:{leaf}"
        if key not in self.sites:
            raise CheckpointError(
                f"`{self.tensors.file}` sits at `{key}`, and this {type(self.sites.backbone).__name__} has no such module. "
                "Load the backbone it was trained on."
            )
        return self.sites[key]

    def behind(self, path: str) -> Site:
        """The last projection of the sub-layer that a bottleneck acts behind.

        Raises:
            CheckpointError: this backbone has none there.
        """
        owner, _, last = path.rpartition(".")
        layer, (sublayer, leaf) = (owner, GLUED[last]) if last in GLUED else (path, ("", ""))
        leaves = (leaf,) if leaf else ("output", "down")
        found = [site for site in below(self.sites, layer, leaves) if not sublayer or (site.role or "").split(".")[-2] == sublayer]
        if len(found) != 1:
            raise CheckpointError(
                f"`{self.tensors.file}` has an adapter at `{path}`, where this {type(self.sites.backbone).__name__} has {len(found)} "
                "sub-layers. Load the backbone it was trained on."
            )
        return found[0]


architectures: Registry[Callable[[Content], list[Part]]] = Registry("architecture of adapters", "adapters_architectures")
"""What reads the parts of a config of that ``architecture``; bottlenecks have none, and are ``bottleneck`` here."""


class AdaptersFormat(Format):
    """Folders that the adapters library's ``save_adapter`` wrote."""

    def recognises(self, folder: Path) -> bool:
        """It has the library's weights, or a config with its version."""
        if (folder / PICKLE).is_file() or (folder / SAFE).is_file():
            return (folder / CONFIG).is_file()
        try:
            return (folder / CONFIG).is_file() and str(read_json(folder / CONFIG).get("version", "")).startswith("adapters.")
        except CheckpointError:
            return False

    def read(self, folder: Path, sites: Index, reading: Reading) -> Foreign:
        """The parts of its config, and the head beside it."""
        config = read_json(folder / CONFIG)
        name, own = config.get("name"), config.get("config")
        if not isinstance(name, str) or not isinstance(own, dict):
            raise CheckpointError(f"`{folder / CONFIG}` has no name or no config of an adapter. Copy the folder again.")
        file = weights_file(folder, SAFE, PICKLE, allow_bin=reading.allow_bin)
        tensors = Tensors(rooted(read_weights(file), sites), file)
        parts = []
        for part in _united(own):
            fields = Fields(part, folder / CONFIG, HARMLESS)
            content = Content(fields, tensors, sites, name, str(config.get("model_type", "")), _version(config.get("version")))
            parts += _reader(part, folder)(content)
            fields.end(allow_unknown=reading.allow_unknown)
        tensors.end(sites)
        heads = _heads(folder, sites, reading)
        backbone = config.get("model_name")
        return Foreign(tuple(parts), heads, backbone if isinstance(backbone, str) and backbone else None)


def _united(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configs of a union; of any other, itself."""
    members = config.get("configs") if config.get("architecture") == "union" else [config]
    return [member for member in members if isinstance(member, Mapping)] if isinstance(members, list) else []


def _reader(config: Mapping[str, Any], folder: Path) -> Callable[[Content], list[Part]]:
    kind = config.get("architecture") or "bottleneck"
    if not isinstance(kind, str) or kind not in architectures:
        raise Unsupported(
            f"`{folder / CONFIG}` has architecture = {kind!r:.80}, which deltatune cannot read; it reads {', '.join(architectures)}. "
            "Train it anew here: `deltatune methods` lists what there is."
        )
    return architectures[kind]


def _version(text: object) -> tuple[int, ...]:
    """``adapters.1.3.0`` -> (1, 3, 0); the newest where none is named."""
    found = re.fullmatch(r"adapters\.(\d+)\.(\d+)\.(\d+).*", str(text))
    return tuple(map(int, found.groups())) if found else RIGHTLY_SCALED


def _heads(folder: Path, sites: Index, reading: Reading) -> dict[tuple[str, str], Tensor]:
    """The head saved beside the adapter; an LM head that equals the backbone's own is none."""
    if not any((folder / name).exists() for name in (HEAD_SAFE, HEAD_PICKLE)):
        return {}
    file = weights_file(folder, HEAD_SAFE, HEAD_PICKLE, allow_bin=reading.allow_bin)
    tensors = Tensors(rooted(read_weights(file), sites), file)
    for name in [name for name in tensors.left if re.search(rf"(^|\.)({CONTAINERS})\.", name)]:
        del tensors.left[name]  # the adapter itself stands in the head's file, too, where the model is its own base
    body, heads = unfrozen(tensors, sites)
    foreign = sorted([*tensors.left, *(name for part in body for name in part.flat)])
    if foreign and not reading.allow_unknown:
        raise Unsupported(
            f"`{file}` holds a head that is none of this {type(sites.backbone).__name__}: {named(foreign)}. Build the "
            "backbone with the same head, or pass allow_unknown=True to load without."
        )
    return heads


@architectures.register("lora")
def read_lora(content: Content) -> list[Part]:
    """LoRA, and (IA)^3, which the library keeps as a LoRA that scales."""
    fields = content.fields
    fields.take("leave_out", [])
    fields.refuse("use_gating")
    fields.refuse("use_dora", why="its DoRA rescales the bias, too, and leaves alpha / r out of the norm")
    for field in ("vera_d", "vera_b"):
        fields.refuse(field, why="its VeRA trains dense matrices")
    found = content.modules("loras")
    content.tensors.need(found, "LoRA")
    letters = fields.take("attn_matrices", ["q", "v"])
    matrices = [name for letter, name in (("q", "query"), ("k", "key"), ("v", "value")) if letter in letters]
    read = {"add": _read_added, "scale": _read_scaled}.get(fields.take("composition_mode", "add"))
    if read is None:
        raise Unsupported(f"`{fields.file}` has a composition_mode that is neither add nor scale. Train it anew here.")
    return [read(content, found, matrices)]


def _read_added(content: Content, found: dict[str, dict[str, Tensor]], matrices: list[str]) -> Part:
    fields = content.fields
    r = fields.take("r", 8)
    alpha = float(fields.take("alpha", 8, int, float))
    if content.version < RIGHTLY_SCALED:
        alpha = float(r)
    tensors: dict[tuple[str, str], Tensor] = {}
    for path, group in found.items():
        A, B = content.tensors.pick(group, path, {"lora_A": 2, "lora_B": 2})
        for site, rows_A, rows_B in _shared_out(content, path, matrices, A, B):
            tensors[site.key, "lora_A"], tensors[site.key, "lora_B"] = rows_A, rows_B
    return Part("lora", LoRA(r, alpha, fields.take("dropout", 0.0)), tensors)


def _read_scaled(content: Content, found: dict[str, dict[str, Tensor]], matrices: list[str]) -> Part:
    fields = content.fields
    fields.refuse("dropout", 0.0)
    fields.refuse("r", 1)
    fields.refuse("alpha", 1)
    tensors: dict[tuple[str, str], Tensor] = {}
    leaves: set[str] = set()
    for path, group in found.items():
        [B] = content.tensors.pick(group, path, {"lora_B": 2})
        for site, _, rows in _shared_out(content, path, matrices, B, B):
            tensors[site.key, "l"] = rows.reshape(-1)
            leaves.add(site.leaf)
    return Part("ia3", IA3(inputs=tuple(leaf for leaf in IA3.inputs if leaf not in leaves)), tensors)


def _shared_out(content: Content, path: str, matrices: list[str], A: Tensor, B: Tensor) -> list[tuple[Site, Tensor, Tensor]]:
    """The site of a module; of a fused projection the site of each of its matrices, with its rows of A and B."""
    if path in content.sites and not any(f"{path}:{leaf}" in content.sites for leaf in matrices):
        return [(content.site(path), A, B)]
    sites = [content.site(path, leaf) for leaf in matrices]
    if not sites or A.shape[0] % len(sites) or B.shape[0] % len(sites):
        raise CheckpointError(f"`{content.tensors.file}`: `{path}` does not divide over {named(matrices)}. Copy the folder again.")
    return list(zip(sites, A.chunk(len(sites)), B.chunk(len(sites)), strict=True))


@architectures.register("bottleneck")
def read_bottleneck(content: Content) -> list[Part]:
    """A bottleneck behind, or beside, a sub-layer: serial, parallel, or Compacter's."""
    fields = content.fields
    fields.take("leave_out", [])
    fields.refuse("use_gating")
    for field in ("ln_before", "ln_after"):
        fields.refuse(field)
    fields.refuse("inv_adapter", why="an invertible adapter is a delta of its own here")
    fields.refuse(
        "original_ln_before", why="its bottleneck reads what the sub-layer's norm makes of the residual; deltatune's reads the sub-layer"
    )
    fields.take("original_ln_after", True)
    fields.take("residual_before_ln", True, bool, str)
    fields.take("adapter_residual_before_ln", False)
    fields.only_trains("stochastic_depth")
    fields.only_trains("dropout")
    fields.take("reduction_factor", 16.0, int, float, dict)
    read = (
        (_read_parallel if fields.take("is_parallel", False) else _read_serial) if not fields.take("phm_layer", False) else _read_products
    )
    found = content.modules("adapters")
    content.tensors.need(found, "adapter")
    return [read(content, found, activation(fields.take("non_linearity", "relu"), fields.file))]


def _plain(content: Content) -> None:
    """Compacter's fields say nothing of a plain bottleneck."""
    for field in PRODUCTS:
        content.fields.take(field, None, object, bool)


PRODUCTS = ("phm_dim", "phm_rank", "phm_bias", "learn_phm", "shared_phm_rule", "factorized_phm_rule", "shared_W_phm", "factorized_phm_W")
NAMES = {"adapter_down.0.weight": 2, "adapter_down.0.bias": 1, "adapter_up.weight": 2, "adapter_up.bias": 1}


def _picked(content: Content, path: str, group: dict[str, Tensor], scale: Tensor | float) -> tuple[Site, list[Tensor], Tensor | float]:
    """Site, tensors and scale of one plain bottleneck; a trained scale stands in the file."""
    learned = group.pop("scaling", None)
    return content.behind(path), content.tensors.pick(group, path, NAMES), scale if learned is None else learned


def _scale(content: Content) -> float:
    """The constant scale; 1 where it is trained, as each bottleneck has its own then."""
    scaling = content.fields.take("scaling", 1.0, int, float, str)
    return 1.0 if isinstance(scaling, str) else float(scaling)


def _width(group: Mapping[str, Tensor]) -> int:
    return next((len(tensor) for name, tensor in group.items() if name == "adapter_down.0.bias"), 0)


def _one_width(content: Content, found: Mapping[str, Mapping[str, Tensor]]) -> int:
    widths = {_width(group) for group in found.values()}
    if len(widths) != 1 or 0 in widths:
        raise Unsupported(f"`{content.tensors.file}` has bottlenecks of the widths {sorted(widths)}; ours have one. Train it anew here.")
    return widths.pop()


def _read_serial(content: Content, found: dict[str, dict[str, Tensor]], f: str) -> Part:
    """h + s U f(D h) behind the sub-layer, with s written into U."""
    _plain(content)
    scale = _scale(content)
    if scale != 1.0 or any("scaling" in group for group in found.values()):
        content.fields.lenient.append(f"scaling = {scale}")
    method = Adapter(_one_width(content, found), f)
    tensors = {}
    for path, group in found.items():
        site, picked, s = _picked(content, path, group, scale)
        for name, tensor in dense(picked, s).items():
            tensors[site.key, name] = tensor
    return Part("adapter", method, tensors)


def _read_parallel(content: Content, found: dict[str, dict[str, Tensor]], f: str) -> Part:
    """h + s U f(D x) beside the sub-layer, x its residual."""
    _plain(content)
    if content.model_type not in AFTER_THE_NORM:
        raise Unsupported(
            f"`{content.fields.file}` has is_parallel = True for a `{content.model_type}`, where the library's bottleneck reads the "
            "residual ahead of the norm; deltatune's reads what the sub-layer is given, behind it. Train anew: scaled-parallel-adapter."
        )
    scale = _scale(content)
    learned = any("scaling" in group for group in found.values())
    if learned:
        content.fields.lenient.append("scaling, which trains")
    method = ScaledParallelAdapter(_one_width(content, found), scale, f)
    tensors = {}
    for path, group in found.items():
        site, picked, s = _picked(content, path, group, 1.0)
        for name, tensor in dense(picked, s).items():
            tensors[site.key, name] = tensor
    return Part("parallel", method, tensors)


def _read_products(content: Content, found: dict[str, dict[str, Tensor]], f: str) -> Part:
    """Compacter: maps sum_i A_i (x) (l_i r_i), with one rule A for all of them, or one for each."""
    fields = content.fields
    for field in ("factorized_phm_rule", "shared_W_phm", "is_parallel"):
        fields.refuse(field)
    n, rank, shared = fields.take("phm_dim", 4), fields.take("phm_rank", 1), fields.take("shared_phm_rule", True)
    for field in ("phm_bias", "learn_phm"):
        if not fields.take(field, True):
            raise Unsupported(f"`{fields.file}` has {field} = False, which our adapters lack. Train it anew here.")
    if not fields.take("factorized_phm_W", True):
        raise Unsupported(f"`{fields.file}` has factorized_phm_W = False, which our Compacter lacks. Train it anew here: phm-adapter.")
    if _scale(content) != 1.0:
        raise Unsupported(f"`{fields.file}` has a scaling that is not 1, which our Compacter lacks. Train it anew here.")
    read = _read_shared_rule if shared else _read_own_rules
    return read(content, found, n, rank, f)


def _maps(content: Content, path: str, group: Mapping[str, Tensor], extra: Mapping[str, int]) -> dict[str, list[Tensor]]:
    """The tensors of both maps of a Compacter's bottleneck."""
    maps = {}
    for side, theirs in (("D", "adapter_down.0"), ("U", "adapter_up")):
        own = {name.removeprefix(f"{theirs}."): tensor for name, tensor in group.items() if name.startswith(f"{theirs}.")}
        maps[side] = content.tensors.pick(own, f"{path}.{theirs}", {**extra, "W_left": 3, "W_right": 3, "b": 1})
    content.tensors.pick(
        {name: tensor for name, tensor in group.items() if not name.startswith(("adapter_down.0.", "adapter_up."))}, path, {}
    )
    return maps


def _read_shared_rule(content: Content, found: dict[str, dict[str, Tensor]], n: int, rank: int, f: str) -> Part:
    rules = [group for group in content.modules("shared_parameters").values() if "phm_rule" in group]
    if len(rules) != 1:
        raise CheckpointError(
            f"`{content.tensors.file}` lacks `shared_parameters.{content.name}.phm_rule`, without which its factors mean nothing: the "
            "library leaves it out for models that are their own base, such as T5. Save it from the trained model with its rule."
        )
    [rule] = content.tensors.pick(rules[0], "shared_parameters", {"phm_rule": 3})
    tensors, sizes = {}, []
    for path, group in found.items():
        site, maps = content.behind(path), _maps(content, path, group, {})
        sizes.append((site.out_features, len(maps["D"][2])))
        for side, picked in maps.items():
            for name, tensor in factors(side, *picked).items():
                tensors[site.key, name] = tensor
    return Part("compacter", Compacter(n, one_reduction(sizes, n), rank, f), tensors, shared={"A": rule.mT})


def _read_own_rules(content: Content, found: dict[str, dict[str, Tensor]], n: int, rank: int, f: str) -> Part:
    content.fields.lenient.append(f"phm_rank = {rank} with a rule of its own for every map")
    tensors, sizes = {}, []
    for path, group in found.items():
        site, maps = content.behind(path), _maps(content, path, group, {"phm_rule": 3})
        sizes.append((site.out_features, len(maps["D"][3])))
        for side, picked in maps.items():
            for name, tensor in products(side, *picked).items():
                tensors[site.key, name] = tensor
    return Part("compacter", PHMAdapter(n, one_reduction(sizes, n), f), tensors)


@architectures.register("prefix_tuning")
def read_prefix(content: Content) -> list[Part]:
    """Prefixes of up to three groups of attentions, each as they are or as an MLP makes them."""
    fields = content.fields
    left_out = set(fields.take("leave_out", []))
    fields.refuse("use_gating")
    fields.take("shared_gating", True)
    for field in ("encoder_prefix", "cross_prefix"):
        fields.take(field, True)
    fields.only_trains("dropout")
    length, flat, mid_dim = fields.take("prefix_length", 30), fields.take("flat", False), fields.take("bottleneck_size", 512)
    f = activation(fields.take("non_linearity", "tanh"), fields.file)
    _drop_copies(content)
    found = content.modules("prefix_tunings")
    content.tensors.need(found, "prefix")
    [groups] = found.values() if len(found) == 1 else [{}]
    made: list[tuple[Site, Tensor, Tensor]] = []
    for label, roles in PREFIXES.items():
        group = {name.removeprefix(f"{label}."): groups.pop(name) for name in list(groups) if name.startswith(f"{label}")}
        if group:
            made += _prefixes(content, group, _chosen(content, roles, left_out), length, flat, f)
    content.tensors.pick(groups, "prefix_tunings", {})
    return [prefix_part("prefix", made, None if flat else mid_dim, content.tensors.file)]


def _drop_copies(content: Content) -> None:
    """The library stores the whole pool once more below every attention."""
    copies = [name for name in content.tensors.left if ".prefix_tuning.pool.prefix_tunings." in name]
    for name in copies:
        del content.tensors.left[name]


def _chosen(content: Content, roles: tuple[str, ...], left_out: set[int]) -> list[Site]:
    """Attentions of these roles, without the layers left out; a decoder's are counted behind the encoder's."""
    depth = 1 + max((site.layer or 0 for site in content.sites if (site.role or "").startswith("encoder.")), default=-1)
    return [
        site
        for site in attentions(content.sites, *roles)
        if (site.layer or 0) + (depth if (site.role or "").startswith("decoder.") else 0) not in left_out
    ]


def _prefixes(
    content: Content, group: Mapping[str, Tensor], sites: list[Site], length: int, flat: bool, f: str
) -> list[tuple[Site, Tensor, Tensor]]:
    if flat:
        [numbers] = content.tensors.pick(group, "prefix_tunings", {"control_trans": 1})
        made = numbers.view(length, -1) if numbers.numel() % length == 0 else numbers[None]
    else:
        names = ("wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias")
        made = through_mlp(content.tensors.pick(group, "prefix_tunings", {name: 2 - name.endswith("bias") for name in names}), f)
    if not sites or made.shape[0] != length or made.shape[1] % (2 * len(sites)):
        raise CheckpointError(
            f"`{content.tensors.file}` makes prefixes of the shape {tuple(made.shape)}, not divisible among {len(sites)} attentions "
            f"of this {type(content.sites.backbone).__name__}. Load the backbone it was trained on."
        )
    layers = torch.unbind(made.reshape(length, 2 * len(sites), -1), 1)
    return [(site, layers[2 * k], layers[2 * k + 1]) for k, site in enumerate(sites)]


formats.register("adapters")(AdaptersFormat())
