"""The batches of each step of one job, in its own order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deltatune.multi.streams import Stream
from deltatune.tasks.tensors import Features, length_of, moved
from deltatune.training.batches import LengthGrouped
from deltatune.training.settings import Settings
from deltatune.training.trainer import Material

Batch = dict[str, Tensor]


class Updates:
    """What a job reads, epoch after epoch, as a Trainer of its own would.

    Args:
        material: encoded rows.
        settings: its knobs.
        seed: of the order.
        stream: its random numbers, of which each epoch draws one.
        device: where the batches go.
    """

    def __init__(self, material: Material, settings: Settings, seed: int, stream: Stream, device: torch.device) -> None:
        self._material, self._seed, self._stream, self._device = material, seed, stream, device
        self._size, self._several = settings.batch_size, settings.grad_accumulation

    @property
    def _batches_in_epoch(self) -> int:
        return -(-len(self._material.kept) // self._size)

    @property
    def _steps_in_epoch(self) -> int:
        return -(-self._batches_in_epoch // self._several)

    def plain(self, backbone: nn.Module) -> Iterator[Batch]:
        """The training rows in order."""
        for batch in self._loader(range(len(self._material.kept)), torch.Generator()):
            yield moved(batch, backbone)

    def _loader(self, order: Any, generator: torch.Generator | None = None) -> DataLoader[Features]:
        rows: Any = self._material.kept
        return DataLoader(rows, self._size, sampler=order, collate_fn=self._material.framing.collate, generator=generator)

    def behind(self, step: int, held: dict[str, Any] | None = None) -> Iterator[tuple[float, list[Batch]]]:
        """Epoch, with its fraction, and batches of each step behind that one, for ever.

        Args:
            step: how many were taken.
            held: the random numbers of a checkpoint, which the stream gets once it stands there again.
        """
        epoch, skipped = divmod(step, self._steps_in_epoch)
        order = LengthGrouped([length_of(row) for row in self._material.kept], self._size, seed=self._seed)
        loader, several, whole = self._loader(order), self._several, self._batches_in_epoch
        if held is not None and not skipped:
            self._stream.held |= held
            held = None
        for number in count(epoch):
            order.set_epoch(number)
            with self._stream:
                iter(loader)  # draws a number, as a run by itself does
            assert loader.batch_sampler is not None
            batches = iter(loader.batch_sampler)
            for update in range(self._steps_in_epoch):
                size = min(several, whole - update * several)
                found = [self._collated(next(batches)) for _ in range(size)]
                if number == epoch and update < skipped:
                    continue
                if held is not None:
                    self._stream.held |= held
                    held = None
                yield number + (update * several + size) / whole, found

    def _collated(self, numbers: Sequence[int]) -> Batch:
        """Rows as a batch; a loader's own way to it takes longer than collating."""
        batch = self._material.framing.collate([self._material.train[number] for number in numbers])
        return {name: tensor.to(self._device) for name, tensor in batch.items()}
