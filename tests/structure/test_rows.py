"""The layouts of fused projections, as index sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.structure.rows import RULES, Heads, heads_of
from deltatune.structure.site import Rows


def numbers(rows: Rows) -> list[int]:
    return list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows.tolist()


@pytest.mark.parametrize(
    ("rule", "total", "parts", "heads", "expected"),
    [
        ("equal", 6, 3, Heads(1, 1), [[0, 1], [2, 3], [4, 5]]),
        ("equal", 4, 2, Heads(1, 1), [[0, 1], [2, 3]]),
        ("grouped", 8, 3, Heads(2, 1), [[0, 1, 2, 3], [4, 5], [6, 7]]),
        ("interleaved", 12, 3, Heads(2, 2), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
        ("interleaved_groups", 8, 3, Heads(4, 2), [[0, 1, 4, 5], [2, 6], [3, 7]]),
        ("alternating", 6, 2, Heads(1, 1), [[0, 2, 4], [1, 3, 5]]),
    ],
)
def test_layouts(rule: str, total: int, parts: int, heads: Heads, expected: list[list[int]]) -> None:
    rows = [numbers(part) for part in RULES[rule](total, parts, heads)]
    assert rows == expected
    assert sorted(number for part in rows for number in part) == list(range(total))


@pytest.mark.parametrize("rule", RULES)
def test_a_total_that_does_not_divide_is_refused(rule: str) -> None:
    with pytest.raises(Unsupported, match="cannot be split into"):
        RULES[rule](7, 3, Heads(3, 3))


def test_index_sets_are_real_under_a_meta_device() -> None:
    with torch.device("meta"):
        rows = RULES["interleaved"](12, 3, Heads(2, 2))
    assert all(isinstance(part, Tensor) and part.device.type == "cpu" for part in rows)


def test_numbers_of_heads() -> None:
    module = nn.Module()
    assert heads_of(module) is None
    module.num_heads = 4
    assert heads_of(module) == Heads(4, 4)
    module.num_kv_heads = 2
    assert heads_of(module) == Heads(4, 2)
