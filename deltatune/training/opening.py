"""Everything from one folder: the backbone a delta belongs to, its tokenizer, and the delta attached."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.backbones import load_backbone, load_config, load_tokenizer
from deltatune.checkpoint.format import load, locate, read
from deltatune.checkpoint.record import Record
from deltatune.errors import CheckpointError
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open(
    folder: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    allow_foreign: bool = False,
    **options: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Delta | Composition]:
    """Load the backbone a saved delta was trained on, with a head of the right size, its tokenizer, and the delta.

    Args:
        folder: what ``save`` or a run wrote.
        backbone: where the backbone is now; the name in the file if left out.
        device: where to bring it.
        dtype: of the backbone; as in training if left out. Another one makes it another backbone: see ``allow_foreign``.
        name: how the delta is called; as it was called if left out.
        allow_foreign: take a backbone that differs from the one of the training.
        options: further arguments of ``load_backbone``, such as ``device_map``.

    Returns:
        The backbone in eval mode, its tokenizer, and the delta or composition.

    Raises:
        CheckpointError: the folder holds no delta, or does not say which backbone it belongs to.
        ForeignBackbone: the backbone has changed since.
        UnknownName: nobody knows the backbone.
        MissingExtra: the backbone's package is not installed.
    """
    place = locate(folder)
    record = read(place)
    known = backbone or record.origin.id
    if known is None:
        raise CheckpointError(
            f"`{place}` does not say which backbone it belongs to ({record.origin.fingerprint.class_name}). "
            "Pass backbone=..., or load the backbone yourself and call dt.load(backbone, folder)."
        )
    options.setdefault("auto_class", _auto_class(known, record))
    quantized = (record.about.training or {}).get("quantize")
    if isinstance(quantized, str):
        options.setdefault("quantize", quantized)
    model = load_backbone(known, dtype=dtype or _dtype(record), **_labels(record), **options)
    if device is not None:
        model.to(device)
    tokenizer = load_tokenizer(known)
    delta = load(model, place, name=name, allow_foreign=allow_foreign)
    return model, tokenizer, delta


def _auto_class(backbone: str, record: Record) -> str:
    """The auto class of transformers that makes the backbone's class."""
    import transformers

    wanted = record.origin.fingerprint.class_name
    kind = type(load_config(backbone))
    for name in sorted(entry for entry in dir(transformers) if entry.startswith("AutoModel")):
        made = getattr(getattr(transformers, name), "_model_mapping", {}).get(kind, ())
        if wanted in {maker.__name__ for maker in (made if isinstance(made, tuple) else (made,))}:
            return name
    raise CheckpointError(
        f"The delta belongs to a {wanted}, which no auto class of transformers makes from `{backbone}`. "
        "Load the backbone yourself and call dt.load(backbone, folder)."
    )


def _dtype(record: Record) -> torch.dtype:
    dtype = getattr(torch, record.origin.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"`{record.name}` names the type `{record.origin.dtype}` for its backbone, which PyTorch does not know. Pass dtype=."
        )
    return dtype


def _labels(record: Record) -> dict[str, Any]:
    """Size and names of the task head's outputs, where a head belongs to the delta."""
    parts = record.member_records or (record,)
    sizes = [part.origin.num_labels for part in parts if part.origin.num_labels is not None]
    if not sizes:
        return {}
    labels = record.about.labels or ()
    return {"label_names": labels} if len(labels) == sizes[0] else {"num_labels": sizes[0]}
