"""``dt.open``: a saved delta on a fresh backbone, with its tokenizer, from one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.checkpoint.format import load, read
from deltatune.checkpoint.record import RECORD, Record
from deltatune.errors import CheckpointError
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.training.place import DELTA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open(
    folder: str | os.PathLike[str], *, name: str | None = None, dtype: torch.dtype | None = None, **options: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase, Delta | Composition]:
    """Load the backbone a delta was trained on, and attach the delta.

    Args:
        folder: a run's folder, or one that ``dt.save`` wrote with its backbone's name.
        name: how the delta is called; as it was called if left out.
        dtype: of the backbone; as in training if left out.
        options: further arguments of ``load_backbone``, such as ``device_map``.

    Returns:
        Backbone (in eval mode), tokenizer, delta.

    Raises:
        CheckpointError: no delta there, a broken one, or one that does not say its backbone.
        ForeignBackbone: the backbone of that name is another one now.

    Example:
        >>> backbone, tokenizer, delta = open("runs/bbc")  # doctest: +SKIP
    """
    place = delta_folder(folder)
    record = read(place)
    training = record.about.training or {}
    if record.origin.id is None:
        raise CheckpointError(
            f"The delta in `{place}` does not say the name of its backbone. Load the backbone yourself: dt.load(backbone, {str(place)!r})."
        )
    settings: dict[str, Any] = {"auto_class": auto_class(record), "quantize": training.get("quantize")}
    if record.origin.num_labels is not None:
        labels = record.about.labels or ()
        fits = len(labels) == record.origin.num_labels
        settings |= {"label_names": labels} if fits else {"num_labels": record.origin.num_labels}
    settings |= {"dtype": dtype or getattr(torch, record.origin.dtype.removeprefix("torch."))} | options
    with torch.random.fork_rng(devices=[]):  # a fresh head draws numbers, which the file replaces
        backbone = load_backbone(record.origin.id, **settings)
    delta = load(backbone, place, name=name)
    return backbone.eval(), load_tokenizer(record.origin.id), delta


def delta_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or the ``delta`` in a run's folder."""
    path = Path(folder).expanduser()
    inside = path / DELTA
    return inside if not (path / RECORD).exists() and (inside / RECORD).exists() else path


def auto_class(record: Record) -> str:
    """transformers' auto class that gives the model the delta was trained on."""
    known = (record.about.training or {}).get("auto_class")
    if known:
        return str(known)
    return "AutoModel" if record.origin.num_labels is None else "AutoModelForSequenceClassification"
