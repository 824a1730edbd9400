"""Prompts and key-value caches: how many tokens a cache holds, room for virtual ones, and masks over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.errors import Unsupported

_STORED = "deltatune_prompt"


def seen_tokens(cache: Any) -> int:
    """Number of tokens in the cache, virtual ones included; 0 without a cache.

    Raises:
        Unsupported: a static cache was reset and is filled again within compiled code, where its length cannot be read.
    """
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor):
        if torch.compiler.is_compiling():
            return 1 if stored_prompt(cache) else 0
        return int(length)
    return int(length)


def stored_prompt(cache: Any) -> int:
    """Number of virtual tokens the cache was filled with."""
    return getattr(cache, _STORED, 0)


def remember(cache: Any, length: int) -> None:
    """Note the number of virtual tokens on the cache."""
    setattr(cache, _STORED, length)


def enlarge(cache: Any, length: int) -> None:
    """Make room for the virtual tokens in a static cache; others grow by themselves.

    Raises:
        Unsupported: it has allocated its tensors already, or holds a window only.
    """
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if getattr(layer, "max_cache_len", None) is None:
            continue
        if layer.is_sliding:
            raise Unsupported(
                "A prompt was asked to enter a static cache with sliding windows, whose masks are made before the prompt is known. "
                "Use a dynamic cache: leave cache_implementation out."
            )
        if not layer.is_initialized:
            layer.max_cache_len += length
        elif stored_prompt(cache) != length:
            raise Unsupported(
                f"A prompt of {length} virtual tokens was asked to enter a static cache that was allocated without room for them. "
                "Give a fresh cache, or let generate() make it."
            )


def widen(mask: Any, length: int, cache: Any) -> Tensor:
    """The mask with ``length`` visible columns in front, and rows for the virtual queries where they are among the queries.

    Args:
        mask: (batch, keys) of 0 and 1; or (batch, 1, queries, keys), boolean or additive, as ``generate`` makes it for static caches.
        length: number of virtual tokens.
        cache: the cache the keys are in; its ``seen_tokens`` tell the first step from later ones.

    Raises:
        Unsupported: any other mask.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not getattr(cache, "is_compileable", False):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise Unsupported(
            f"A prompt was asked to extend an attention mask it cannot read ({shape}). Give a mask of 0 and 1, (batch, seq), or none."
        )
    visible = mask.new_zeros(()) if mask.is_floating_point() else mask.new_ones(())
    columns = visible.expand(*mask.shape[:-1], length)
    if not seen_tokens(cache):
        hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        rows = mask.new_full((*mask.shape[:2], length, length + mask.shape[-1]), hidden)
        upper = torch.ones(length, length + mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        return torch.cat([torch.where(upper, visible, rows), torch.cat([columns, mask], dim=-1)], dim=-2)
    # generate() counts columns as text where it had a padding mask, which ends before the query's own column, and as
    # text and prompt where it had none
    queries = torch.arange(mask.shape[-2], device=mask.device) + cache.get_seq_length()
    own = mask.gather(-1, queries.view(1, 1, -1, 1).expand(*mask.shape[:2], -1, 1))
    return torch.where(own == visible, mask, torch.cat([columns, mask[..., :-length]], dim=-1))
