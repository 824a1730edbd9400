"""How token patches learn where each token stands: the layer's own call says it, so recomputation and compilation see the same.

A transformer layer is given the mask of its attention. A key that no query may see is padding, so each of the forms
in which masks come tells the padding: 0 and 1, boolean, additive, or a ``src_key_padding_mask``; no mask means no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.branches import KeepingAct
from deltatune.injection.slot import first_input, input_names
from deltatune.structure.index import Index
from deltatune.structure.site import Site

MASK = "attention_mask"
PADDING = "src_key_padding_mask"
"""Boolean, True at padding: of ``nn.TransformerEncoderLayer``."""


class TokensAct(KeepingAct):
    """Keeps the ranks of the tokens for the token patches of the same module."""

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read them from the call."""
        if self.givens:
            ranks = token_ranks(first_input(args, kwargs, self.names), dict(zip(self.names, args, strict=False)) | kwargs)
            for given in self.givens:
                given.keep(ranks)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output as it is."""
        for given in self.givens:
            given.drop()
        return output


def token_ranks(x: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The rank of each token of x among the real tokens of its row, from the beginning and from the end, 1 the first; 0 at padding.

    Tokens in a key-value cache count.

    Args:
        x: hidden states (batch, seq, hidden).
        call: what the layer was given, by name.

    Returns:
        (2, batch, seq).

    Raises:
        Unsupported: hidden states of another shape, or a mask of another form.
    """
    if x.ndim != 3:
        raise Unsupported(f"First or last tokens were asked of hidden states of shape {tuple(x.shape)}. Give (batch, seq, hidden).")
    batch, queries, _ = x.shape
    real = _real(call)
    real = torch.ones(batch, queries, dtype=torch.bool, device=x.device) if real is None else real.to(x.device).expand(batch, -1)
    ranks = torch.stack([real.cumsum(1), real.flip(1).cumsum(1).flip(1)]) * real  # (2, batch, keys)
    if real.shape[1] == queries:
        return ranks
    place = torch.arange(real.shape[1], device=x.device)
    end = (place * real.any(0)).max() + 1  # a static cache ends in keys that are still to come
    return ranks.index_select(2, end - queries + torch.arange(queries, device=x.device))


def _real(call: Mapping[str, Any]) -> Tensor | None:
    """Which keys are no padding, (batch, keys) or (1, keys); None if all.

    Raises:
        Unsupported: a mask of another form.
    """
    if call.get(PADDING) is not None:
        return call[PADDING] == 0  # type: ignore[no-any-return]
    mask = call.get(MASK)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise Unsupported(
            f"First or last tokens were asked for under an attention mask that cannot be read ({shape}). "
            "Load the backbone with attn_implementation='sdpa' or 'eager'."
        )
    if mask.ndim == 2:
        return mask != 0  # of flash kernels
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return seen.flatten(1, 2).any(1)


def check_tokens(site: Site, index: Index) -> None:
    """Refuse a module that is not told which tokens are padding.

    Raises:
        Unsupported: first and last tokens could be padding there.
    """
    names = input_names(type(site.module))
    if site.leaf != "layer" or not {MASK, PADDING} & set(names):
        raise Unsupported(
            f"First or last tokens were asked for at `{site.path}` ({type(site.module).__name__}), which is not told which tokens are "
            "padding. Choose whole layers (role `layer`), or edit all tokens."
        )
