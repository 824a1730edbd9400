"""The order of training rows: rows of like length share a batch, and epoch and seed alone decide who comes when; streamed rows too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import torch
from torch.utils.data import IterableDataset, Sampler

from deltatune.tasks.collector import collector_held
from deltatune.tasks.framing import Framing
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import Features, length_of, tokens_of

POOL = 16
"""Batches that are sorted together."""


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

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, pool: int = POOL) -> None:
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


class Streamed(IterableDataset[Features]):
    """Training examples for ever, one batch behind the other: pools of rows are read, encoded, and ordered as ``LengthGrouped`` does.

    Each iteration begins with the first pass and gives the same, so a resumed run that skips what it has seen goes on as it would have.

    Args:
        framing: encodes the rows.
        rows: the number of a pass -> all rows, one after the other.
        batch_size: examples a batch.
        seed: of the order.

    Attributes:
        given: examples given so far.
        tokens: of these.
    """

    def __init__(self, framing: Framing, rows: Callable[[int], Iterator[Row]], batch_size: int, seed: int = 0) -> None:
        self.framing = framing
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.given = self.tokens = 0

    def __iter__(self) -> Iterator[Features]:
        rows = (row for number in count() for row in self.rows(number))
        left: list[Features] = []
        for number in count():
            with collector_held():
                pool = left + self.framing.encode(list(islice(rows, POOL * self.batch_size)))
            order = LengthGrouped([length_of(features) for features in pool], self.batch_size, self.seed)
            order.set_epoch(number)
            places = list(order)
            whole = len(places) - len(places) % self.batch_size
            for place in places[:whole]:
                self.given += 1
                self.tokens += tokens_of(pool[place])
                yield pool[place]
            left = [pool[place] for place in places[whole:]]
