"""LoRA files of llama.cpp: one GGUF with the factors under llama.cpp's names, in the order of rows its attention expects."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.combine import factored
from deltatune.checkpoint.folder import place_of
from deltatune.checkpoint.targets import Given, targets
from deltatune.errors import OutputError, Unsupported, missing_extra
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.methods.kinds import OutputPatch
from deltatune.structure.index import Index


@dataclass(frozen=True)
class Dialect:
    """How llama.cpp holds one kind of model.

    Attributes:
        architecture: its name there.
        paired: query and key have the two halves of each head's rows interleaved, as its rotary embedding wants them.
    """

    architecture: str
    paired: bool = False


DIALECTS: dict[str, Dialect] = {
    "llama": Dialect("llama", paired=True),
    "mistral": Dialect("llama", paired=True),
    "qwen2": Dialect("qwen2"),
    "qwen3": Dialect("qwen3"),
    "gemma3_text": Dialect("gemma3"),
}
"""``model_type`` of a transformers config -> dialect."""

PAIRED = {"query": "num_attention_heads", "key": "num_key_value_heads"}
"""Leaf of the role -> the config's number of its heads."""


def write_gguf_lora(delta: Delta | Composition, file: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a LoRA as llama.cpp's ``--lora`` and its Python bindings read it: W' = W + (alpha / r) B A, in fp32.

    Args:
        delta: a LoRA, or one of its kin that only has factors, on the linear maps of a decoder in ``DIALECTS``. Others become
            one by ``approximate``.
        file: where to, named ``*.gguf``.
        overwrite: replace a file of that name.

    Returns:
        The file.

    Raises:
        Unsupported: llama.cpp has no form for the delta or its backbone.
        OutputError: the file is there already, or cannot be written; nothing is left half-written.
        MissingExtra: the package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as cause:
        raise missing_extra("gguf", "gguf") from cause
    target = place_of(file)
    if target.suffix != ".gguf" or target.is_dir():
        name = f"{target.name}.gguf"
        raise OutputError(
            f"`{target}` cannot be written: llama.cpp reads a LoRA from one file called `*.gguf`. Call it `{name}`, for example."
        )
    if target.exists() and not overwrite:
        raise OutputError(f"`{target}` is there already. Choose another name, or give overwrite=True (--overwrite).")
    dialect = _dialect(delta)
    tensors = _tensors(delta, dialect, gguf)
    alpha = float(next(iter(tensors.values())).shape[0])
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.saving")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(fresh, dialect, delta.name, alpha, tensors, gguf)
        with fresh.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(fresh, target)
    except OSError as cause:
        raise OutputError(f"`{target}` cannot be written: {cause.strerror or cause}. Free some space, or choose another place.") from cause
    finally:
        fresh.unlink(missing_ok=True)
    return target


def _dialect(delta: Delta | Composition) -> Dialect:
    model_type = str(getattr(getattr(delta.backbone, "config", None), "model_type", type(delta.backbone).__name__))
    if model_type not in DIALECTS:
        raise Unsupported(
            f"`{delta.name}` sits on a `{model_type}`, and llama.cpp's LoRA files are known here for {', '.join(DIALECTS)}. "
            "Convert it to merged, and the result with llama.cpp's convert_hf_to_gguf.py."
        )
    return DIALECTS[model_type]


def _tensors(delta: Delta | Composition, dialect: Dialect, gguf: Any) -> dict[str, Tensor]:
    """llama.cpp's names -> factors, ``lora_a`` first; the scale is in B, as if alpha were the rank of the first one."""
    if isinstance(delta, Composition):
        raise Unsupported(
            f"`{delta.name}` is a composition, and a GGUF LoRA holds one delta. Convert it to lora first (--to lora --rank R)."
        )
    pairs = factored(delta)
    index = delta.ledger.index(delta.backbone)
    names = gguf.get_tensor_name_map(_architecture(dialect, gguf), max(index.depths.values(), default=0))
    found: dict[str, Tensor] = {}
    alpha = 0.0
    for entry in delta.entries:
        known = names.get_name(entry.site.path)
        if entry.key not in pairs or known is None or not _is_plain(entry):
            raise Unsupported(
                f"`{delta.name}` has a {type(entry.patch).__name__} at `{entry.key}`, and llama.cpp takes low-rank changes of linear maps "
                "it knows alone. Convert it to lora first (--to lora --rank R), without a task head."
            )
        A, B = (entry.patch.state_dict()[part].float() for part in pairs[entry.key])
        rank = A.shape[0]
        alpha = alpha or float(rank)
        scale = float(getattr(entry.patch, "scale", 1.0)) * rank / alpha  # llama.cpp multiplies by alpha / rank
        found[f"{known}.weight.lora_a"] = A
        found[f"{known}.weight.lora_b"] = scale * _rows(entry, B, dialect, index)
    return found


def _architecture(dialect: Dialect, gguf: Any) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == dialect.architecture)


def _is_plain(entry: Entry) -> bool:
    """A whole linear map that is no other module's as well."""
    site = entry.site
    return isinstance(entry.patch, OutputPatch) and isinstance(site.module, nn.Linear) and site.rows is None and not site.tied


def _rows(entry: Entry, B: Tensor, dialect: Dialect, index: Index) -> Tensor:
    """B with its rows in llama.cpp's order: (heads, 2, half) as transformers rotates them -> (heads, half, 2)."""
    number = PAIRED.get(entry.site.leaf) if dialect.paired else None
    if number is None:
        return B
    config: Any = index.backbone.config
    heads = int(getattr(config, number, None) or config.num_attention_heads)
    return B.reshape(heads, 2, B.shape[0] // heads // 2, -1).transpose(1, 2).reshape(B.shape)


def _write(file: Path, dialect: Dialect, name: str, alpha: float, tensors: Mapping[str, Tensor], gguf: Any) -> None:
    writer = gguf.GGUFWriter(file, dialect.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key in sorted(tensors):
            writer.add_tensor(key, tensors[key].detach().to(torch.float32).cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@targets.register("gguf-lora")
def gguf_lora(given: Given, out: Path) -> Mapping[str, Any]:
    """One file for llama.cpp."""
    given.refuse_rank("gguf-lora")
    write_gguf_lora(given.delta, out, overwrite=given.overwrite)
    return {}
