"""Prompts that are made from other parameters while they train, and held as they are from ``export`` on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltatune.methods.kinds import Patch, PromptPatch


class MadePrompt(PromptPatch):
    """P = ``make()`` until ``export`` replaces what makes it by P itself."""

    @abstractmethod
    def make(self) -> Tensor:
        """P from the training-time parameters, (num_virtual_tokens, hidden)."""

    @property
    def is_exported(self) -> bool:
        """It holds P itself."""
        return "P" in self._parameters

    def forward(self) -> Tensor:
        """P, (num_virtual_tokens, hidden)."""
        return self._parameters["P"] if self.is_exported else self.make()  # type: ignore[return-value]

    @torch.enable_grad()  # without gradients an LSTM may run another kernel, with other last bits
    def export(self) -> None:
        """Hold P instead of what makes it."""
        if self.is_exported:
            return
        P = self.make().detach().clone()
        self._parameters.clear()
        self._modules.clear()
        self.P = nn.Parameter(P)

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Hold P where the state holds P."""
        if "P" in state:
            self.export()


def export_prompts(patches: Sequence[Patch]) -> None:
    """Replace by P what makes it, in every such prompt."""
    for patch in patches:
        if isinstance(patch, MadePrompt):
            patch.export()


def are_exported(patches: Sequence[Patch]) -> bool:
    """Every such prompt holds its P."""
    return all(patch.is_exported for patch in patches if isinstance(patch, MadePrompt))
