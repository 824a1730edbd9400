"""Gradient checkpointing: a part of a forward that is computed anew uses the route of its forward, whatever is open by then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.injection.switching import disabled

if TYPE_CHECKING:
    from deltatune.multi.bank import Bank

NAME = "_gradient_checkpointing_func"
"""Where transformers keeps the function that checkpoints a layer."""


class Captured:
    """A checkpointing function that carries along the plan under which it was called."""

    def __init__(self, checkpoint: Callable[..., Any], bank: Bank) -> None:
        self.checkpoint, self.bank = checkpoint, bank

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``, to be computed anew under this plan."""
        bank, plan = self.bank, self.bank.opened.plan
        assert plan is not None

        def planned(*args: Any, **kwargs: Any) -> Any:
            if bank.opened.plan is plan:
                return function(*args, **kwargs)
            bank.check(plan)
            with disabled(bank.backbone), bank.opened.entered(plan):
                return function(*args, **kwargs)

        bank.opened.numbers.append(plan.number)  # its lanes stay as they are while this may be called
        weakref.finalize(planned, bank.opened.numbers.remove, plan.number).atexit = False
        return self.checkpoint(planned, *args, **kwargs)


def checkpointing(backbone: nn.Module) -> list[nn.Module]:
    """The modules that can be checkpointed."""
    return [module for module in backbone.modules() if hasattr(module, "gradient_checkpointing")]


@contextmanager
def captured(layers: Sequence[nn.Module], bank: Bank) -> Iterator[None]:
    """Let the modules that are checkpointed now carry the plan along."""
    active = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False) and NAME in vars(layer)]
    before = [vars(layer)[NAME] for layer in active]
    for layer, checkpoint in zip(active, before, strict=True):
        vars(layer)[NAME] = Captured(checkpoint, bank)
    try:
        yield
    finally:
        for layer, checkpoint in zip(active, before, strict=True):
            vars(layer)[NAME] = checkpoint
