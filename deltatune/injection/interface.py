"""What an attention module tells about itself: whether, and with which implementation, it runs on transformers' attention interface."""

from __future__ import annotations

import inspect

from torch import nn

MARK = "deltatune_"
"""What the names of our attention implementations begin with."""

PAST = "deltatune_past"
"""Keyword that carries the number of cached tokens from an attention's pre-hook to ``attend`` (relative positions only)."""


def is_on_interface(module: nn.Module) -> bool:
    """Whether the attention module asks transformers' ``AttentionInterface`` which implementation to run."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def has_variant(implementation: str | None) -> bool:
    """Whether an implementation can be extended: eager, sdpa, and the flash kernels, none of them paged."""
    return implementation is not None and "|" not in implementation and (implementation in ("eager", "sdpa") or "flash" in implementation)


def has_table(module: nn.Module) -> bool:
    """The attention has its own table of relative positions, as T5's first blocks."""
    return isinstance(getattr(module, "relative_attention_bias", None), nn.Module) and hasattr(module, "compute_bias")
