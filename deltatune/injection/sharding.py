"""Backbones that FSDP2 (``fully_shard``) takes in hand after deltas were attached: it holds shards, and whole Parameters for a forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def as_held(value: Tensor, theta: Tensor) -> Tensor:
    """``value`` in the form in which ``theta`` is held: this process's shard of it, cut without communication, or whole, gathered."""
    sharded, wanted = hasattr(value, "full_tensor"), hasattr(theta, "full_tensor")
    if sharded == wanted:
        return value
    if sharded:
        return value.full_tensor()  # type: ignore[attr-defined, no-any-return]
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, theta.device_mesh, theta.placements, src_data_rank=None)  # type: ignore[attr-defined]


def reshard(backbone: nn.Module) -> None:
    """Put the shards back where a forward left whole copies, as FSDP2's root does: what is written into a copy is lost."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in backbone.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
