"""Portions: what each job asks of the backbone, joined to one call, and of what that returns each job's part.

A framing computes its loss by calling a model. A ``Portion`` stands in for the model: asked first, it notes the call; asked
again, it gives this job's part of the joined call's logits. So a job's loss is its framing's own, whatever that is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.tasks.tensors import IGNORED

KEPT = "logits_to_keep"
TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""Inputs of a decoder with an encoder; their length is not that of the others."""


@dataclass(frozen=True)
class Call:
    """One job's call of the backbone, with every tensor (rows, ...)."""

    inputs: Mapping[str, Any]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What has a row for each of the batch."""
        return {name: value for name, value in self.inputs.items() if isinstance(value, Tensor) and name != KEPT}

    @cached_property
    def rows(self) -> int:
        """Of the batch."""
        return next(iter(self.tensors.values())).shape[0]

    def length(self, *, target: bool = False) -> int:
        """Tokens of a row, of the text or of what a decoder writes; 0 where there is none."""
        return next((value.shape[1] for name, value in self.tensors.items() if (name in TARGETS) == target and value.ndim > 1), 0)

    @cached_property
    def kind(self) -> Hashable:
        """What calls must agree in to be joined: their names, what is no tensor, and any axes beside rows and tokens."""
        plain = tuple((name, repr(value)) for name, value in sorted(self.inputs.items()) if not isinstance(value, Tensor))
        return (
            plain,
            KEPT in self.inputs,
            tuple((name, tuple(value.shape[2:]), value.dtype) for name, value in sorted(self.tensors.items())),
        )


class _Noted(Exception):
    """No error: the call is known, and the loss goes no further."""


class Portion(nn.Module):
    """Stands for the backbone while one job's loss is computed.

    Args:
        backbone: what it stands for; framings look at its forward.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "module", backbone)
        self.call: Call | None = None
        self.logits: Tensor | None = None

    def forward(self, **inputs: Any) -> Any:
        """Note the call, or give what it returns."""
        if self.logits is None:
            self.call = Call(inputs)
            raise _Noted
        return SimpleNamespace(logits=self.logits)

    def ask(self, loss: Any) -> Call:
        """The call that ``loss(self)`` makes."""
        self.logits = None
        try:
            loss(self)
        except _Noted:
            assert self.call is not None
            return self.call
        raise Unsupported("A framing was asked for its loss, and computed it without the backbone. Train its jobs apart.")


@dataclass
class Joined:
    """Several calls as one.

    Attributes:
        calls: in order.
        pad: the id that fills up shorter rows.
        extra: by how many tokens text and target are longer than their longest, so that no two axes are mistaken for each other.
    """

    calls: Sequence[Call]
    pad: int = 0
    extra: tuple[int, int] = (0, 0)
    kept: Tensor | None = field(default=None, init=False)

    def length(self, *, target: bool = False) -> int:
        """Tokens of a row."""
        longest = max(call.length(target=target) for call in self.calls)
        return longest + self.extra[target] if longest else 0

    @property
    def sizes(self) -> list[int]:
        """Rows of each call."""
        return [call.rows for call in self.calls]

    def inputs(self) -> dict[str, Any]:
        """Of the joined call: shorter rows are filled up on the right."""
        first = self.calls[0]
        joined: dict[str, Any] = {name: value for name, value in first.inputs.items() if not isinstance(value, Tensor)}
        for name in first.tensors:
            length = self.length(target=name in TARGETS)
            fill = IGNORED if name == "labels" else self.pad if name.endswith("input_ids") else 0
            parts = [call.tensors[name] for call in self.calls]
            joined[name] = torch.cat([_filled(part, length, fill) if part.ndim == 2 else part for part in parts])
        if KEPT in first.inputs:
            self.kept = torch.unique(torch.cat([call.inputs[KEPT] for call in self.calls]))
            joined[KEPT] = self.kept
        return joined

    def parts(self, logits: Tensor, widths: Sequence[int | None]) -> list[Tensor]:
        """The logits of each call as it alone would have got them.

        Args:
            logits: of the joined call, (rows, outputs) or (rows, tokens, outputs).
            widths: outputs of each call's task; None for all.
        """
        found = []
        for call, part, width in zip(self.calls, torch.split(logits, self.sizes), widths, strict=True):
            if part.ndim == 3 and self.kept is not None:
                if len(call.inputs[KEPT]) < len(self.kept):  # else it kept what all of them did
                    part = part.index_select(1, torch.searchsorted(self.kept, call.inputs[KEPT]))
            elif part.ndim == 3:
                part = part[:, : call.length(target=True) or call.length()]
            found.append(part if width is None else part[..., :width])
        return found


def _filled(tensor: Tensor, length: int, value: int) -> Tensor:
    return F.pad(tensor, (0, length - tensor.shape[1]), value=value) if tensor.shape[1] < length else tensor
