"""Shifts the positions of text behind virtual keys, at the module that receives the position ids.

A prefix of P tokens takes the positions 0 to P-1, so the text's ids grow by P where they become embeddings or rotations:
exact with left padding too, where shifting at the root is not, because each architecture counts its ids in its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import InvalidValue, Unsupported

if TYPE_CHECKING:
    from deltatune.injection.rows import RowPrefixes


class Long(Protocol):
    """Something with a number of virtual tokens that take positions."""

    ahead: int

    @property
    def rows(self) -> RowPrefixes | None:
        """The virtual tokens of each row, within a route."""


class Shift:
    """Adds the length of the longest prefix among some attentions to the position ids of one module.

    Args:
        module: an embedding of positions, or a rotary embedding.
        path: where it is, for errors.

    Raises:
        Unsupported: it receives no position ids.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.path = path
        self.acts: list[Long] = []
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._is_table = type(module).forward is nn.Embedding.forward
        if not self._is_table and not {"position_ids", "past_key_values_length"} & set(self._names):
            raise Unsupported(
                f"A prefix must shift the positions at `{path}` ({type(module).__name__}), but that module receives no position ids: "
                f"it takes {', '.join(self._names)}. Choose another method for this backbone, such as LoRA."
            )
        self._handles: list[RemovableHandle] = []
        self._wraps = False

    def listen(self, module: nn.Module) -> None:
        """Register the hook."""
        self._handles = [module.register_forward_pre_hook(self.before, with_kwargs=True), module.register_forward_hook(self.after)]

    def remove(self) -> None:
        """Take the hook back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook: the same call with the ids shifted.

        Raises:
            InvalidValue: the table of positions ends before the last shifted one.
        """
        rows = [found for found in [act.rows for act in self.acts] if found is not None]
        if rows:
            return self._by_rows(module, args, kwargs, list({found.shape: found for found in rows}.values()))
        length = max([0, *(act.ahead for act in self.acts)])
        if not length:
            return None
        if self._is_table:
            return (self._shifted(module, args[0], length), *args[1:]), kwargs
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if given.get("position_ids") is not None:
            return (), given | {"position_ids": self._shifted(module, given["position_ids"], length)}
        past = given.get("past_key_values_length", 0) + length
        self._check(module, given[self._names[0]].shape[1] + past - 1)
        return (), given | {"past_key_values_length": past}

    def _by_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[RowPrefixes]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The same call with each row's ids shifted by its own number of virtual tokens."""
        if self._is_table:
            return (self._shifted_by(module, args[0], _ahead(rows, args[0].shape[0])), *args[1:]), kwargs
        given = dict(zip(self._names, args, strict=False)) | kwargs
        first = given[self._names[0]]
        ids, past = given.get("position_ids"), given.get("past_key_values_length", 0)
        self._wraps = ids is None or ids.ndim == 1  # then the module adds a batch axis to what it is given
        if ids is None:
            ids = torch.arange(past, past + first.shape[1], device=first.device)
        ids = ids[None] if ids.ndim == 1 else ids
        return (), given | {"position_ids": self._shifted_by(module, ids, _ahead(rows, first.shape[0]))}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Post-hook: without the axis that was added."""
        wrapped, self._wraps = self._wraps, False
        return output.squeeze(0) if wrapped and isinstance(output, Tensor) and output.ndim == 4 else output

    def _shifted_by(self, module: nn.Module, ids: Tensor, ahead: Tensor) -> Tensor:
        shifted: Tensor = ids + ahead.to(ids.device).view(-1, *[1] * (ids.ndim - 1))
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            self._check(module, int(shifted.max()))
        return shifted

    def _shifted(self, module: nn.Module, ids: Tensor, length: int) -> Tensor:
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            self._check(module, int(ids.max()) + length)
        else:
            self._check(module, ids.shape[-1] + length - 1)
        return ids + length

    def _check(self, module: nn.Module, last: int) -> None:
        """Not asked of a rotary embedding, which has no table; an accelerator is not synchronised for it, only lengths are compared."""
        table = getattr(module, "weight", None)
        if table is not None and last + getattr(module, "offset", 0) >= table.shape[0]:
            raise InvalidValue(
                f"The text and its virtual tokens reach position {last}, but `{self.path}` ({type(module).__name__}) has "
                f"{table.shape[0] - getattr(module, 'offset', 0)} positions. Truncate the text, or use fewer virtual tokens."
            )


def _ahead(rows: Sequence[RowPrefixes], batch: int) -> Tensor:
    """By how much each row is shifted: by its longest prefix. Ids of one row are meant for all."""
    size = batch if batch > 1 else len(rows[0].chosen)
    return rows[0].ahead(size) if len(rows) == 1 else torch.stack([found.ahead(size) for found in rows]).amax(0)
