"""The plain backbone beside the trained one, for losses that compare the two, such as DPO's; it costs no memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.injection.switching import disabled


class Reference(nn.Module):
    """x -> backbone(x) with all deltas disabled: the reference model of preference training.

    It owns no parameters, and calls the very model that is trained. Pass it where a trainer takes a reference model:
    ``trl.DPOTrainer(model=backbone, ref_model=Reference(backbone), ...)``.

    Args:
        backbone: a model with deltas attached.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._held = (backbone,)  # in a tuple: as a submodule, its mode and parameters would be the reference's too

    @property
    def backbone(self) -> nn.Module:
        """The model that is trained."""
        return self._held[0]

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.backbone.config

    @property
    def device(self) -> Any:
        """The backbone's."""
        return next(self.backbone.parameters()).device

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The backbone's output without its deltas. Not ``forward``, which trainers replace on what they are given."""
        with disabled(self.backbone):
            return self.backbone(*inputs, **named)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The same."""
        return self(*inputs, **named)
