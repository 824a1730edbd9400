"""The order of rows: every row once, like lengths together, decided by seed and epoch."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltatune.training.batches import LengthGrouped


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_every_row_comes_once(lengths: list[int], batch_size: int, epoch: int) -> None:
    sampler = LengthGrouped(lengths, batch_size, seed=1)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_seed_and_epoch_alone_decide() -> None:
    lengths = list(range(1, 65))
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        sampler = LengthGrouped(lengths, 4, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global generator has no say
        orders[seed, epoch] = list(sampler)
        assert list(sampler) == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 4


def test_batches_hold_like_lengths_and_come_in_random_order() -> None:
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGrouped(lengths, 8, pool=80))
    batches = [[lengths[index] for index in order[start : start + 8]] for start in range(0, 640, 8)]
    assert max(max(batch) - min(batch) for batch in batches) < 10
    means = [sum(batch) / 8 for batch in batches]
    assert means not in (sorted(means), sorted(means, reverse=True))
