"""Random draws: taken once for each forward of the root, so that every reader of a parameter, and every recomputation, sees the same.

A recomputation under gradient checkpointing cannot tell which forward it repeats. So there may be only one to repeat.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deltatune.errors import Unsupported
from deltatune.methods.kinds import Patch, Stochastic


class Draws:
    """The patches of one backbone that draw random numbers."""

    def __init__(self) -> None:
        self._patches: dict[str, list[Stochastic]] = {}
        self._to_repeat = False
        self._forwards = 0
        self._backward = -1

    def add(self, delta: str, patch: Patch) -> None:
        """Take in a patch of a delta, if it draws."""
        if isinstance(patch, Stochastic):
            self._patches.setdefault(delta, []).append(patch)

    def drop(self, delta: str) -> None:
        """Forget the patches of a delta."""
        self._patches.pop(delta, None)

    @property
    def any(self) -> bool:
        """Some patch draws."""
        return bool(self._patches)

    def take(self, deltas: Iterable[str]) -> None:
        """Draw anew for the deltas that act: a training forward begins."""
        for delta in deltas:
            for patch in self._patches.get(delta, ()):
                patch.draw()

    def count(self) -> None:
        """A training forward is through; a backward may repeat parts of it."""
        self._forwards += self._to_repeat and torch.is_grad_enabled()
        self._to_repeat = False

    def read(self) -> None:
        """Called when a patch that draws is read, by a forward or by a backward that repeats a part of one.

        Raises:
            Unsupported: there were several such forwards since the last such backward, and only the last one's draws are left.
        """
        backward = torch._C._current_graph_task_id()
        if backward == -1:
            self._to_repeat |= _is_checkpointed()
        elif backward != self._backward:
            forwards, self._forwards, self._backward = self._forwards, 0, backward
            if forwards > 1:
                raise Unsupported(
                    f"Gradient checkpointing was asked to repeat one of {forwards} forwards, and a delta draws random numbers for each: "
                    "only the last draws are left. Join the batches into one forward, run those that want no gradients under "
                    "torch.no_grad(), or turn checkpointing off."
                )


def _is_checkpointed() -> bool:
    """Within either mode of ``torch.utils.checkpoint``: one switches gradients off, the other one hooks what is saved for them."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
