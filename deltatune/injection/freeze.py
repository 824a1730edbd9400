"""What trains: the backbone is frozen at the first attach and thawed after the last detach; between, the deltas decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from deltatune.injection.sharding import reshard
from deltatune.methods.kinds import SelectionPatch

if TYPE_CHECKING:
    from deltatune.injection.delta import Delta


def freeze(backbone: nn.Module) -> dict[str, bool]:
    """Freeze every parameter; returns ``requires_grad`` as it was, by name."""
    before = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    return before


def thaw(backbone: nn.Module, before: dict[str, bool]) -> None:
    """Restore what ``freeze`` recorded; a parameter that came later trains if it can, as PyTorch's default is."""
    for name, parameter in backbone.named_parameters():
        can_train = parameter.is_floating_point() or parameter.is_complex()  # not what was quantised meanwhile
        parameter.requires_grad_(can_train and before.get(name, True))


def refresh_gradients(delta: Delta) -> None:
    """Set ``requires_grad`` of a delta's parameters from what is enabled, frozen, merged and live."""
    reshard(delta.backbone)
    wanted = delta.wants_gradients
    for entry in delta.entries:
        if isinstance(entry.patch, SelectionPatch):
            live = entry.choice.live
            owner = delta.ledger.deltas.get(live) if live is not None else None
            entry.parameter.requires_grad_(owner is not None and owner.wants_gradients)
        for name, parameter in entry.patch.named_parameters():
            parameter.requires_grad_(wanted and entry.flags.get(name, True))
    if delta.shared is not None:
        for name, parameter in delta.shared.named_parameters():
            parameter.requires_grad_(wanted and delta.shared_flags.get(name, True))
