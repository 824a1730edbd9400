"""Optimiser steps as ``DeltaTrainer`` takes them, without its loop: for estimates, which take a few and keep none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from deltatune.injection.compose import optimizer_groups
from deltatune.training.borrowed import recomputing
from deltatune.training.life import Life, Trained
from deltatune.training.settings import Settings

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Steps:
    """What takes steps.

    Attributes:
        backbone: with the deltas attached.
        trained: those that train.
        loss: the mean of one batch.
        settings: of the run.
    """

    backbone: nn.Module
    trained: Sequence[Trained]
    loss: Loss
    settings: Settings

    @contextmanager
    def taking(self) -> Iterator[Callable[[Batch], None]]:
        """Within the block, the function that takes one step on a batch; gradients and the optimiser's state end with it."""
        settings, life = self.settings, Life(self.trained, max(self.settings.max_steps or 0, 1000))
        optimizer = AdamW(optimizer_groups(self.trained, 1e-6), lr=1e-6, weight_decay=settings.weight_decay)
        for group in optimizer.param_groups:  # what AdamW chooses by itself, which tensors without numbers would hide from it
            group["foreach"] = next(self.backbone.parameters()).is_cuda
        passes = min(settings.grad_accumulation, 2)  # behind the second, nothing new is held
        self.backbone.train()

        def step(batch: Batch) -> None:
            life.before_step()
            for _ in range(passes):
                with self._precision():
                    loss = self.loss(self.backbone, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            life.add_penalty()
            if settings.max_grad_norm:
                nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], settings.max_grad_norm)
            optimizer.step()
            life.after_step()
            optimizer.zero_grad()

        with recomputing(self.backbone) if settings.gradient_checkpointing else nullcontext():
            yield step

    def _precision(self) -> Any:
        device = next(self.backbone.parameters()).device.type
        return torch.autocast(device, torch.bfloat16) if self.settings.bf16 else nullcontext()
