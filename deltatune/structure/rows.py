"""Which output rows of a fused projection belong to which role.

A fused projection computes several roles with one matrix. Its rule says how the rows are laid out; the layouts differ
between architectures that look alike, and a wrong one would adapt a mixture of query, key and value unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltatune.errors import Unsupported
from deltatune.structure.site import Rows

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "num_query_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of an attention: ``query`` of them, ``groups`` for keys and values (equal unless grouped)."""

    query: int
    groups: int


Rule = Callable[[int, int, Heads], list[Rows]]
"""(number of rows, number of parts, heads) -> the rows of each part, in the order in which the roles are named."""


def heads_of(attention: nn.Module) -> Heads | None:
    """The numbers of heads of ``attention``, from its attributes or its config; None if neither tells."""
    sources = (attention, getattr(attention, "config", None))
    query = _first(sources, _HEADS)
    if query is None:
        return None
    return Heads(query, _first(sources, _GROUPS) or query)


def _first(sources: Sequence[object], names: Sequence[str]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def equal(total: int, parts: int, heads: Heads) -> list[Rows]:
    """Parts of equal size, one after the other: [q; k; v]. GPT-2, ModernBERT, ``nn.MultiheadAttention``."""
    size = _whole(total, parts)
    return [slice(i * size, (i + 1) * size) for i in range(parts)]


def grouped(total: int, parts: int, heads: Heads) -> list[Rows]:
    """One after the other, with fewer heads for keys and values: [q (h d); k (g d); v (g d)]. Phi-3."""
    d = _whole(total, heads.query + 2 * heads.groups)
    query, group = heads.query * d, heads.groups * d
    return [slice(0, query), slice(query, query + group), slice(query + group, total)]


def interleaved(total: int, parts: int, heads: Heads) -> list[Rows]:
    """Per head one after the other: rows (h, 3, d). GPT-NeoX, BLOOM, Persimmon."""
    d = _whole(total, parts * heads.query)
    rows = torch.arange(total, device="cpu").view(heads.query, parts, d)
    return [rows[:, i].flatten() for i in range(parts)]


def interleaved_groups(total: int, parts: int, heads: Heads) -> list[Rows]:
    """Per group of heads its queries, its key and its value: rows (g, h / g + 2, d). Falcon's newer layout."""
    share = _whole(heads.query, heads.groups)
    d = _whole(total, heads.groups * (share + 2))
    rows = torch.arange(total, device="cpu").view(heads.groups, share + 2, d)
    return [rows[:, :share].flatten(), rows[:, share].flatten(), rows[:, share + 1].flatten()]


def alternating(total: int, parts: int, heads: Heads) -> list[Rows]:
    """Row i belongs to part i modulo the number of parts. The experts of GPT-OSS."""
    _whole(total, parts)
    return [torch.arange(i, total, parts, device="cpu") for i in range(parts)]


def _whole(total: int, parts: int) -> int:
    size, rest = divmod(total, parts)
    if rest:
        raise Unsupported(
            f"A fused projection of {total} rows cannot be split into {parts} equal parts. Declare its rows in an architecture file."
        )
    return size


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (equal, grouped, interleaved, interleaved_groups, alternating)}
"""The layouts an architecture file can name."""
