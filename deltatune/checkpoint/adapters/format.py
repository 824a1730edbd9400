"""The adapters library's folders: ``adapter_config.json`` beside ``pytorch_adapter.bin`` or ``adapter.safetensors``, and a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.checkpoint.adapters.content import RIGHTLY_SCALED, Content, architectures
from deltatune.checkpoint.foreign import Foreign, Format, Part, Reading, formats
from deltatune.checkpoint.foreign_files import Fields, read_json, read_weights, weights_file
from deltatune.checkpoint.foreign_shapes import (
    Tensors,
    rooted,
    unfrozen,
)
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError, Unsupported
from deltatune.structure.index import Index

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


formats.register("adapters")(AdaptersFormat())
