"""Gates around patches: how much of a change takes effect, one number a row of the batch, read from what passes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.kinds import BranchPatch, ConditionalPrefixPatch, OutputPatch, Patch, PrefixPatch, Reforming
from deltatune.structure.site import Site

Reads = Literal["input", "output"]
"""What a gate reads: the input of the patched module, or its output."""


class Gate(nn.Module):
    """g = mean over a row's positions of sigmoid(x . w + b), with w: (width,) ~ N(0, 0.02^2) and b = 0, so that g is near one half.

    Where a model flattens a batch to tokens, as OPT does ahead of its feed-forward network, each token is a row.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width) * 0.02)
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., width) -> (batch, ..., 1), with every axis between of length 1."""
        g = torch.sigmoid((x * self.w.to(x.dtype)).sum(-1, keepdim=True) + self.b.to(x.dtype))
        return g.mean(tuple(range(1, x.ndim - 1)), keepdim=True) if x.ndim > 2 else g


class GatedOutput(OutputPatch):
    """y + g (F(x, y) - y)."""

    def __init__(self, inner: OutputPatch, width: int, reads: Reads) -> None:
        super().__init__()
        self.inner = inner
        self.gate = Gate(width)
        self.reads = reads

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(batch, ..., in), (batch, ..., out) -> (batch, ..., out)."""
        g = self.gate(x if self.reads == "input" else y).to(y.dtype)
        return y + g * (self.inner(x, y) - y)  # type: ignore[no-any-return]

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """As the patch inside does."""
        reform_inner(self.inner, state)


class GatedPrefix(ConditionalPrefixPatch):
    """g P_k and g P_v."""

    def __init__(self, inner: PrefixPatch, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gate = Gate(width)
        with torch.no_grad():
            self.num_virtual_tokens = int(inner()[0].shape[-2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seq, width) -> twice (batch, key_value_heads, num_virtual_tokens, head_dim)."""
        P_k, P_v = self.inner()
        g = self.gate(x).unsqueeze(-1)  # (batch, 1, 1, 1)
        return g * P_k, g * P_v

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """As the prefix inside does."""
        reform_inner(self.inner, state)


def gated(patch: Patch, site: Site, reads: Reads) -> Patch:
    """The patch with a gate that reads what passes by at its site.

    Raises:
        Unsupported: what it changes has no rows, or nothing there can be read.
    """
    if isinstance(patch, OutputPatch) and not isinstance(patch, BranchPatch) and site.channel_axis == -1:
        return GatedOutput(patch, site.in_features if reads == "input" else site.out_features, reads)
    if isinstance(patch, PrefixPatch) and reads == "input":
        return GatedPrefix(patch, input_width(site))
    raise Unsupported(
        f"{type(patch).__name__} at `{site.key}` cannot have a gate: a gate weighs what a module returns for each row of a batch, or a "
        "prefix. Leave the site out of `where`, or use the method without a gate."
    )


def ungated(patch: Patch) -> Patch:
    """The patch inside the gate, if there is one."""
    return patch.inner if isinstance(patch, GatedOutput | GatedPrefix) else patch


def input_width(site: Site) -> int:
    """Width of the hidden states that an attention is given.

    Raises:
        Unsupported: its config does not tell.
    """
    width = getattr(getattr(site.module, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise Unsupported(
            f"A prefix with a gate was asked for at `{site.path}` ({type(site.module).__name__}), which has no config that tells the width "
            "of its input. Attentions on transformers' attention interface have one, and a prefix can enter no others. "
            "Choose another method for this backbone, such as LoRA."
        )
    return width


def reform_inner(inner: Patch, state: Mapping[str, Tensor]) -> None:
    """Let the patch inside take the form of its part of the state."""
    if isinstance(inner, Reforming):
        inner.reform(below("inner", state))


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}
