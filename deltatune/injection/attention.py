"""The attention implementations that let virtual keys and values in: one per implementation of transformers.

``deltatune_sdpa`` is ``sdpa`` with [P_k; K] and [P_v; V] in place of K and V where the attention module has acting
prefixes, and ``sdpa`` itself where it has none; likewise for ``eager`` and the flash kernels. The prefix joins behind
the key-value cache, so every cache works unchanged. Each comes with a mask function that never skips the mask: sdpa's
own may return None and leave causality to a flag, which counts the prefix columns as text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.interface import MARK, PAST
from deltatune.injection.prefix import PrefixAct
from deltatune.injection.slot import slot_of

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_BASES: dict[str, Attention] = {}
_EAGER: dict[type[nn.Module], Attention] = {}


def register(implementation: str, kind: type[nn.Module]) -> None:
    """Enter the variant of ``implementation`` with transformers.

    Args:
        implementation: ``eager``, ``sdpa`` or a flash kernel.
        kind: a class of attention that will run it; eager attention is the function of the class's own file.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = MARK + implementation
    _EAGER.setdefault(kind, _eager_of(kind))
    if implementation != "eager":
        _BASES[name] = ALL_ATTENTION_FUNCTIONS[implementation]
    masks = {"eager": whole_eager_mask, "sdpa": whole_sdpa_mask}
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, masks.get(implementation) or ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def whole_sdpa_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The boolean mask (batch, 1, queries, keys), always."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


def whole_eager_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The additive mask (batch, 1, queries, keys), always."""
    from transformers.masking_utils import eager_mask

    return eager_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over [P_k; K] and [P_v; V].

    Args:
        module: the attention; its slot holds the prefixes.
        query: (batch, heads, queries, head_dim).
        key: (batch, key_value_heads, keys, head_dim), cached ones included.
        value: like key.
        attention_mask: (batch, 1, queries, keys), boolean or additive; (batch, keys) for flash kernels.
        **kwargs: what the base implementation takes.
    """
    name: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    flash = "flash" in name
    past = kwargs.pop(PAST, None)
    slot = slot_of(module)
    act = slot.acts.get(PrefixAct) if slot is not None else None
    if isinstance(act, PrefixAct) and act.columns:
        _refuse(flash, key, act.columns, kwargs)
        prefix_key, prefix_value = act.prefix(key, value)
        causal, rows = _is_causal(module, name, kwargs), act.rows
        visible = None if rows is None else rows.visible(key.shape[0])
        attention_mask = extend_mask(attention_mask, query, key, act.columns, causal, visible)
        if kwargs.get("position_bias") is not None:
            columns = act.bias_columns(kwargs["position_bias"], query, key, past)
            bias = kwargs["position_bias"]
            kwargs["position_bias"] = torch.cat([columns, bias.expand(columns.shape[0], *bias.shape[1:])], dim=-1)
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
    base = _EAGER[type(module)] if name == MARK + "eager" else _BASES[name]
    return base(_Plain(module, name) if flash else module, query, key, value, attention_mask, **kwargs)


def extend_mask(mask: Tensor | None, query: Tensor, key: Tensor, length: int, causal: bool, seen: Tensor | None = None) -> Tensor | None:
    """The mask with ``length`` columns in front, visible but where ``seen`` tells otherwise.

    Args:
        mask: (..., keys), boolean, additive, or a flash kernel's 0/1; None if every key is visible, or causality is left to a flag.
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim).
        length: number of virtual tokens.
        causal: None means causal, with query i seeing keys 0 to i.
        seen: (batch, length), the columns that a row sees; None for all.
    """
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if (not causal or queries == 1) and seen is None:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device)
        mask = (mask.tril() if causal and queries > 1 else mask)[None, None]
    if seen is not None:
        return _joined_mask(mask, seen, key)
    visible = mask.new_zeros(()) if mask.is_floating_point() else mask.new_ones(())
    return torch.cat([visible.expand(*mask.shape[:-1], length), mask], dim=-1)


def _joined_mask(mask: Tensor, seen: Tensor, key: Tensor) -> Tensor:
    """The mask with columns (batch, length) in front that differ between rows."""
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    front = torch.where(seen, 0 if mask.is_floating_point() else 1, hidden).to(mask.dtype)
    mask = mask.expand(key.shape[0], *mask.shape[1:])
    front = front.view(key.shape[0], *[1] * (mask.ndim - 2), -1)
    return torch.cat([front.expand(*mask.shape[:-1], -1), mask], dim=-1)


def _is_causal(module: nn.Module, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa would make a missing mask causal; eager attention never does, and flash kernels align to the last key."""
    if name != MARK + "sdpa":
        return False
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _refuse(flash: bool, key: Tensor, length: int, kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None:
        raise Unsupported("Prefixes were asked to act in continuous batching with a paged cache, which they cannot enter. Use generate().")
    window = kwargs.get("sliding_window")
    if flash and window is not None and key.shape[2] + length > window:
        raise Unsupported(
            f"Prefixes were asked to act in an attention with a window of {window} tokens that runs a flash kernel, and the kernel would "
            "hide the prefix behind the window. Load the backbone with attn_implementation='sdpa'."
        )
    if flash and kwargs.get("cu_seq_lens_q") is not None:
        raise Unsupported(
            "Prefixes were asked to act on packed sequences with a flash kernel, which has no room for them between the sequences. "
            "Load the backbone with attn_implementation='sdpa', or pad instead of packing."
        )


class _Plain:
    """An attention module as a flash kernel should see it: the kernel chooses its library by the implementation's name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self.config = _PlainConfig(module.config, name.removeprefix(MARK))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _PlainConfig:
    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._attn_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _eager_of(kind: type[nn.Module]) -> Attention:
    """``eager_attention_forward`` of the file that defines this class of attention."""
    for cls in kind.__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return _no_eager


def _no_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    raise Unsupported(
        f"Prefixes were asked to act in {type(module).__name__}, whose file has no eager attention. "
        "Load the backbone with attn_implementation='sdpa'."
    )
