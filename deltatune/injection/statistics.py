"""Running statistics: what a normalisation layer learns in its forward belongs to the frozen backbone, and stays as it is.

While deltas are attached, such layers normalise by their running statistics in training, too, so that detaching finds
them unchanged, and a delta's file holds all that it learnt.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Statistics:
    """The layers of one backbone that track statistics, kept from training for the length of each forward of the root.

    Args:
        backbone: the root.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._layers = [module for module in backbone.modules() if getattr(module, "running_mean", None) is not None]
        self._stilled: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def listen(self, backbone: nn.Module) -> None:
        """Register the hooks, where there is such a layer."""
        if self._layers:
            self._handles = [
                backbone.register_forward_pre_hook(self.before),
                backbone.register_forward_hook(self.after, always_call=True),
            ]

    def unlisten(self) -> None:
        """Take the hooks back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore()

    def before(self, backbone: nn.Module, args: Any) -> None:
        """Pre-hook of the root."""
        self._restore()  # a forward that was broken off ran no post-hook
        self._stilled = [layer for layer in self._layers if layer.training]
        for layer in self._stilled:
            layer.training = False

    def after(self, backbone: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the root."""
        self._restore()

    def _restore(self) -> None:
        for layer in self._stilled:
            layer.training = True
        self._stilled = []
