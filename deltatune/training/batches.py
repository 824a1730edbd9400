"""The order of training rows: rows of like length share a batch, and epoch and seed alone decide who comes when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """Row indices, one batch behind the other; within a batch the lengths are alike, and the batches are in random order.

    The rows are shuffled, cut into pools of ``pool`` batches, sorted by length within each pool, and the batches are
    shuffled; an incomplete batch comes last. transformers' sampler draws from the global generator, so a resumed run
    would see another order; this one asks only for the seed and the epoch.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows a batch.
        seed: of the order.
        pool: batches that are sorted together.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, pool: int = 16) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the rows the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.pool * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=self.lengths.__getitem__)
            batches.extend(pool[k : k + self.batch_size] for k in range(0, len(pool), self.batch_size))
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        shuffled = [whole[k] for k in torch.randperm(len(whole), generator=generator).tolist()]
        return iter([index for batch in shuffled + rest for index in batch])
