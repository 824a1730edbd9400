"""``dt.open``: a saved delta on a fresh backbone, with its tokenizer, from one folder."""

from __future__ import annotations

import os
from pathlib import Path
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
    name: str | None = None,
    dtype: torch.dtype | None = None,
    allow_foreign: bool = False,
    **options: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Delta | Composition]:
    """Load the backbone a delta was trained on, with a head of the right size, and attach the delta.

    Args:
        folder: a run's folder, or one that ``dt.save`` wrote with its backbone's name.
        backbone: the backbone's name or folder, where it is not the one in the file.
        device: where to bring it.
        name: how the delta is called; as it was called if left out.
        dtype: of the backbone; as in training if left out. Another one makes it another backbone: see ``allow_foreign``.
        allow_foreign: take a backbone that differs from the one of the training.
        options: further arguments of ``load_backbone``, such as ``device_map``.

    Returns:
        Backbone (in eval mode), tokenizer, delta.

    Raises:
        CheckpointError: no delta there, a broken one, or one that does not say its backbone.
        ForeignBackbone: the backbone of that name is another one now.
        UnknownName: nobody knows the backbone.
        MissingExtra: the backbone's package is not installed.

    Example:
        >>> backbone, tokenizer, delta = open("runs/bbc")  # doctest: +SKIP
    """
    place = locate(folder)
    record = read(place)
    known = backbone or record.origin.id
    if known is None:
        raise CheckpointError(
            f"The delta in `{place}` does not say the name of its backbone ({record.origin.fingerprint.class_name}). "
            f"Pass backbone=..., or load the backbone yourself: dt.load(backbone, {str(place)!r})."
        )
    settings: dict[str, Any] = {"quantize": (record.about.training or {}).get("quantize"), "dtype": dtype or _dtype(record)}
    settings |= _labels(record) | options
    if "auto_class" not in settings:
        settings["auto_class"] = auto_class(record, known)
    with torch.random.fork_rng(devices=[]):  # a fresh head draws numbers, which the file replaces
        model = load_backbone(known, **{"new_head": True, **settings})
    if device is not None:
        model.to(device)
    delta = load(model, place, name=name, allow_foreign=allow_foreign)
    return model.eval(), load_tokenizer(known), delta


def delta_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds the delta: this one, or ``delta`` in a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    return locate(folder)


def auto_class(record: Record, backbone: str) -> str:
    """transformers' auto class that makes the class the delta was trained on.

    Raises:
        CheckpointError: none makes it.
    """
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
            f"`{record.name}` has the type `{record.origin.dtype}` for its backbone, which PyTorch does not know. Pass dtype=."
        )
    return dtype


def _labels(record: Record) -> dict[str, Any]:
    """Size and names of the outputs of the head that belongs to the delta."""
    size, labels = record.origin.num_labels, record.about.labels or ()
    if size is None:
        return {}
    return {"label_names": labels} if len(labels) == size else {"num_labels": size}
