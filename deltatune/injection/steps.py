"""Counts the steps of all optimizers: a fused one writes parameters without telling their version counters."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def steps() -> int:
    """How many steps optimizers have made in this process so far; those in compiled code, which tells the counters, are left out."""
    return _steps


def _count(*_: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():
        _steps += 1


register_optimizer_step_post_hook(_count)
