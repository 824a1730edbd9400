"""Recomputing: what a slot's forward saves for its backward is saved as a formula where it has one, and made anew when it is asked for.

    saved tensor x  ->  how x follows from what the backbone keeps in any case (``injection.formulas``)

The hooks lie around a slot's acts and its module's forward, so every way in which a patch reads x gains, and every trainer. They stay out
where somebody else decides what is kept (gradient checkpointing without re-entry, offloading), where their opening and closing could
cross another hook's, in compiled code, which chooses for itself, and in transforms. Decision 15 says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from deltatune.injection.formulas import Formula, Kept, formula_of, unpack


@dataclass
class Recomputing:
    """Whether the slots of a backbone do so; one per backbone."""

    is_on: bool = False


@dataclass(frozen=True)
class Anew:
    """A tensor saved as its formula.

    Attributes:
        formula: how to make it.
        stride: how it lay in memory.
        device: the type of its device.
    """

    formula: Formula
    stride: tuple[int, ...]
    device: str

    def read(self) -> Tensor:
        """The tensor, made anew: as it lay, and in the types of the forward whatever the backward runs under."""
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            x = self.formula.make()
        return x if x.stride() == self.stride else torch.empty_strided(x.shape, self.stride, dtype=x.dtype, device=x.device).copy_(x)


class Keeper:
    """The hooks of one slot.

    Args:
        recomputing: whether they are laid.
    """

    def __init__(self, recomputing: Recomputing) -> None:
        self.recomputing = recomputing
        self._holds: dict[str, bool] = {}

    def begin(self, module: nn.Module) -> None:
        """Lay the hooks, ahead of the module's forward."""
        self.end()  # a forward that was interrupted left them
        if self.recomputing.is_on and is_alone(module):
            torch._C._autograd._push_saved_tensors_default_hooks(self.pack, unpack)

    def end(self) -> None:
        """Take them away, behind it."""
        if self.recomputing.is_on and _is_ours(_top()):
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def pack(self, x: Tensor) -> Kept | Anew:
        """What is saved for x."""
        formula = formula_of(x)
        if formula is None:
            return Kept(x)
        anew = Anew(formula, x.stride(), x.device.type)
        key = f"{formula.names} {x.dtype} {x.device}"
        if key not in self._holds:
            self._holds[key] = agrees(anew.read(), x)
        return anew if self._holds[key] else Kept(x)


def agrees(made: Tensor, x: Tensor) -> bool:
    """The formula gives x, to the rounding of a few operations: asked once at each place, for what nobody foresaw."""
    if made.shape != x.shape or made.dtype != x.dtype:
        return False
    x = x.detach()
    bound = 8 * torch.finfo(x.dtype).eps * x.abs().nan_to_num(0.0).amax() if x.numel() else 0.0
    return bool(torch.isclose(made, x, rtol=0.0, atol=float(bound), equal_nan=True).all())


def is_alone(module: nn.Module) -> bool:
    """A module without children, in a forward with gradients, on which nobody but its slot has hooks, nor on what it saves."""
    if not torch.is_grad_enabled() or len(module._modules) > 1:
        return False
    others = len(module._forward_pre_hooks) + len(module._forward_hooks) > 2
    if others or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._autograd._saved_tensors_hooks_is_enabled() and _top() is None  # type: ignore[attr-defined]


def _top() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _is_ours(top: Any) -> bool:
    return top is not None and top[1] is unpack
