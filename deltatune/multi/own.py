"""Own: the very tensors of deltas that train, as the lanes of a table, so that gradients reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.methods.lanes import Lane

if TYPE_CHECKING:
    from deltatune.multi.forms.form import Form
    from deltatune.multi.ground import Beside, Ground


class Own:
    """Lanes that are read anew in each forward; looked at where they lie if that is side by side.

    Args:
        form: of the table.
        sources: each reads the patch of one lane.
        grounds: where the tensors of several deltas may lie side by side.
        zero: a lane that changes nothing goes ahead of them, for rows without one.

    Attributes:
        beside: each tensor of all lanes, where they lie side by side; None where some do not.
    """

    def __init__(self, form: Form, sources: Sequence[Callable[[], Lane]], grounds: Sequence[Ground], *, zero: bool) -> None:
        self.form, self.sources, self.zero = form, tuple(sources), zero
        self.beside = self._found(grounds) if grounds else None

    def __call__(self) -> dict[str, Tensor]:
        """Name -> (lanes, ...)."""
        if self.beside is not None:
            lanes = {name: one() for name, one in self.beside.items()}
        else:
            fitted = [self.form.fitted(source().tensors) for source in self.sources]
            lanes = {name: torch.stack([lane[name] for lane in fitted]) for name in fitted[0]}
        if not self.zero:
            return lanes
        neutral = self.form.neutral({name: tensor[0].detach() for name, tensor in lanes.items()})
        return {name: torch.cat([neutral[name][None], tensor]) for name, tensor in lanes.items()}

    def _found(self, grounds: Sequence[Ground]) -> dict[str, Beside] | None:
        """Each tensor of all lanes; None where some do not lie side by side."""
        lanes = [source() for source in self.sources]
        found = {}
        for name in lanes[0].plain:
            parts, scales = [lane.plain[name] for lane in lanes], [lane.scales.get(name, 1.0) for lane in lanes]
            stacked = next((own for ground in grounds if (own := ground.stacked(parts, scales)) is not None), None)
            if stacked is None:
                return None
            found[name] = stacked
        return found
