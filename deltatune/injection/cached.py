"""Prompts and key-value caches: how many tokens a cache holds, room for virtual ones, and the masks ``generate`` makes ahead.

For a cache of fixed size ``generate`` makes the mask (batch, 1, queries, keys) before the stack is called and before the
prompt is known, so it is wrong for the stack. The padding is read from the first of these masks and kept with the
cache, and the stack makes its own masks from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.errors import Unsupported

_STORED = "deltatune_prompt"


@dataclass
class Stored:
    """What a cache knows about the prompt in it.

    Attributes:
        length: number of virtual tokens.
        mask: (batch, keys) of 0 and 1 over the first step's tokens, virtual ones included; None if all are visible.
    """

    length: int
    mask: Tensor | None = None


def stored(cache: Any) -> Stored:
    """What the cache knows about its prompt."""
    return getattr(cache, _STORED, None) or Stored(0)


def store(cache: Any, length: int, mask: Tensor | None = None) -> None:
    """Note the prompt on the cache."""
    setattr(cache, _STORED, Stored(length, mask))


def seen_tokens(cache: Any) -> int:
    """Number of tokens in the cache, virtual ones included; 0 without a cache.

    Within compiled code the length of a static cache cannot be read, and any other number than 0 means that a prompt is in it.
    """
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return stored(cache).length
    return int(length)


def enlarge(cache: Any, length: int, window: int | None) -> None:
    """Make room for the virtual tokens in a static cache; others grow by themselves.

    Args:
        cache: an empty cache.
        length: number of virtual tokens.
        window: how many tokens a layer with a sliding window keeps at most.
    """
    more = length - stored(cache).length  # a cache that was reset has room for its last prompt
    if more <= 0:
        return
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if hasattr(layer, "max_cache_len"):
            enlarged = layer.max_cache_len + more
            layer.max_cache_len = min(enlarged, window) if layer.is_sliding and window else enlarged
            layer.is_initialized = False  # it allocates its tensors at the next update


def capacity(cache: Any) -> int | None:
    """How many tokens a static cache holds; None where it grows, or keeps a window only."""
    layers = [] if cache is None else getattr(cache, "self_attention_cache", cache).layers
    return max((layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len") and not layer.is_sliding), default=None)


def first_mask(mask: Any, cache: Any, queries: int) -> Tensor | None:
    """The mask of the text's tokens at the first step: (batch, queries) of 0 and 1, or None where all are visible.

    Args:
        mask: that; or what ``generate`` made for a cache of fixed size: boolean or additive, or one for each sort of layer.
        cache: the cache it was made for.
        queries: number of tokens the stack is given.

    Raises:
        Unsupported: any other mask.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not is_made_ahead(mask, cache):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise Unsupported(
            f"A prompt was asked to extend an attention mask it cannot read ({shape}). Give a mask of 0 and 1, (batch, seq), or none."
        )
    visible: Tensor = mask == 0 if mask.is_floating_point() else mask
    return visible[:, 0, :, :queries].any(1).long()


def later_mask(cache: Any, queries: int) -> Tensor | None:
    """The mask at a later step, in place of one that ``generate`` made: the first step's, and ones for what came since.

    Raises:
        Unsupported: rows of padding alone came first, so that what came since may be padding too.
    """
    first = stored(cache).mask
    if first is None:
        return None
    if queries > 1 and not torch.compiler.is_compiling() and not (first.sum(1) > stored(cache).length).all():
        raise Unsupported(
            "Rows with more padding than one chunk were asked to enter a static cache in chunks behind a prompt. "
            "Raise prefill_chunk_size, or leave it out."
        )
    keys = capacity(cache) or cache.get_seq_length() + queries  # what is not filled yet is hidden by causality
    return torch.cat([first, first.new_ones(first.shape[0], keys - first.shape[1])], dim=1)


def is_made_ahead(mask: Any, cache: Any) -> bool:
    """Whether ``generate`` made the mask for a cache of fixed size."""
    whole = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    return whole and bool(getattr(cache, "is_compileable", False))
