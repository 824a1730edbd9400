"""Lanes: what a patch is as data, for batches in which each row uses another delta.

A patch that can say what it computes in a few tensors of a known *form* is one lane of a table there (``multi``), scaling
and all folded in. Such a patch has a method ``lane``; a test holds the form against the patch's own forward. The forms:

| form | tensors | is |
|---|---|---|
| ``low-rank`` | A (in, r), B (r, out) | y + (dropout(x) A) B |
| ``lookup`` | A (rows, r), B (r, width) | y + A[ids] B |
| ``vectors`` | d (r,), b (out,); shared A (in, r), B (r, out) | y + b * ((d * (dropout(x) A)) B) |
| ``decomposed`` | A (in, r), B (r, out), g (out,) | y + g * (y - bias) + (x A) B |
| ``scale`` | l (width,) | l * y |
| ``shift`` | b (width,) | y + b |
| ``bottleneck`` | D (in, r), c (r,), U (r, out), e (out,) | y + f(h D + c) U + e, where h is y or x |
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Lane:
    """One patch as data of a form.

    Attributes:
        form: its name.
        plain: the tensors of the lane, under the form's letters; they carry gradients to the patch's parameters.
        settings: what lanes must agree in to stand in one table.
        shared: tensors that all lanes with the same ``settings`` have in common.
        scales: by what some of ``plain`` are to be multiplied; views of parameters can be stacked without a copy, products cannot.
    """

    form: str
    plain: Mapping[str, Tensor]
    settings: tuple[Hashable, ...] = ()
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Scaling folded in."""
        return {name: self.scales[name] * tensor if name in self.scales else tensor for name, tensor in self.plain.items()}


@runtime_checkable
class Laned(Protocol):
    """An output or input patch that can be a lane."""

    def lane(self) -> Lane | None:
        """The patch as data; None where its settings have no such form."""


@runtime_checkable
class LanedWeight(Protocol):
    """A weight patch that can be a lane of the linear map around it."""

    def lane_of(self, theta: Tensor) -> Lane | None:
        """The change of the output x theta'^T as data; None where theta is no plain matrix (out, in)."""
