"""What was frozen before the first attach, and how it comes back after the last detach."""

from __future__ import annotations

from torch import nn


def freeze(backbone: nn.Module) -> dict[str, bool]:
    """Freeze every parameter; returns ``requires_grad`` as it was, by name."""
    before = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    return before


def thaw(backbone: nn.Module, before: dict[str, bool]) -> None:
    """Restore what ``freeze`` recorded; a parameter that came later trains, as PyTorch's default is."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(before.get(name, True))
