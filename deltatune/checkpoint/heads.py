"""Task heads by themselves: the one that a folder holds beside its delta, for a backbone whose own has another size."""

from __future__ import annotations

import os

from torch import Tensor, nn

from deltatune.checkpoint.folder import place_of
from deltatune.checkpoint.foreign import Reading, foreign_format, read_foreign
from deltatune.checkpoint.format import locate, read
from deltatune.checkpoint.loading import index_of
from deltatune.checkpoint.record import TENSORS
from deltatune.checkpoint.tensors import named, not_finite, read_tensors
from deltatune.errors import CheckpointError


def read_head(backbone: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The task head in a folder of ours, or of a library that ``checkpoint.foreign`` knows; nothing is attached.

    Args:
        backbone: one like that which the delta was trained on, with a head of whatever size.
        folder: as for ``dt.load``.

    Returns:
        Name below the backbone's head -> tensor: ``weight`` and ``bias`` of a head that is one linear map.

    Raises:
        CheckpointError: the folder is damaged, holds no task head, or one with NaN or infinity.
        Unsupported: another library's folder holds what cannot be translated.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> import deltatune as dt
        >>> from deltatune.methods import LoRA
        >>> size = dict(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> five = BertForSequenceClassification(BertConfig(**size, num_labels=5))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = dt.save(dt.attach(five, LoRA(rank=2), name="topics"), f"{place}/topics")
        ...     two = BertForSequenceClassification(BertConfig(**size, num_labels=2))
        ...     {name: tuple(tensor.shape) for name, tensor in sorted(read_head(two, f"{place}/topics").items())}
        {'bias': (5,), 'weight': (5, 4)}
    """
    kind = foreign_format(folder)
    if kind is None:
        place = locate(folder)
        record = read(place)
        heads = () if record.is_composition else record.heads
        digest = record.stored.sha256 if record.stored is not None else None
        kept = read_tensors(place / TENSORS, digest) if heads else {}
        found = {key[len(head) + 1 :]: tensor for head in heads for key, tensor in kept.items() if key.startswith(f"{head}.")}
    else:
        foreign = read_foreign(index_of(backbone), place_of(folder), kind, Reading())
        found = {name: tensor for (_, name), tensor in foreign.heads.items()}
    if not found:
        raise CheckpointError(f"`{folder}` holds no task head. Give the folder of a delta that was trained and saved with one.")
    broken = not_finite(found)
    if broken:
        raise CheckpointError(f"The task head in `{folder}` holds NaN or infinity in {named(broken)}. Train it again.")
    return found
