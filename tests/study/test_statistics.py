"""Statistics against published numbers, and against scipy where it has them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltatune.study.statistics import complete, critical_difference, holm, mean_of, over_categories, over_tasks, paired, ranks

NEMENYI = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}
"""Critical values at 5 % by the number of methods (Demsar 2006, table 5a)."""

AUC = {
    "adult": (0.763, 0.768, 0.771, 0.798), "breast": (0.599, 0.591, 0.590, 0.569), "wisconsin": (0.954, 0.971, 0.968, 0.967),
    "cmc": (0.628, 0.661, 0.654, 0.657), "ionosphere": (0.882, 0.888, 0.886, 0.898), "iris": (0.936, 0.931, 0.916, 0.931),
    "liver": (0.661, 0.668, 0.609, 0.685), "lung": (0.583, 0.583, 0.563, 0.625), "lymph": (0.775, 0.838, 0.866, 0.875),
    "mushroom": (1.000, 1.000, 1.000, 1.000), "tumor": (0.940, 0.962, 0.965, 0.962), "rheum": (0.619, 0.666, 0.614, 0.669),
    "voting": (0.972, 0.981, 0.975, 0.975), "wine": (0.957, 0.978, 0.946, 0.970),
}  # fmt: skip
"""Scores of four methods on fourteen tasks, after an example of Demsar's; ties are among them."""

METHODS = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
TABLE = {task: dict(zip(METHODS, row, strict=True)) for task, row in AUC.items()}


def test_critical_values_are_the_published_ones() -> None:
    found = {k: critical_difference(k, 1) / math.sqrt(k * (k + 1) / 6) for k in NEMENYI}
    assert found == pytest.approx(NEMENYI, abs=1.5e-3)


def place(row: dict[str, float], method: str) -> float:
    """1 + those that are better + half of the others that are as good."""
    better = sum(value > row[method] for value in row.values())
    alike = sum(value == row[method] for value in row.values()) - 1
    return 1 + better + alike / 2


def test_ranks() -> None:
    found = ranks(TABLE, METHODS)
    assert found is not None and found.tasks == 14
    assert found.average == pytest.approx({method: np.mean([place(row, method) for row in TABLE.values()]) for method in METHODS})
    assert list(found.average) == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]
    assert found.difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert found.alike == [tuple(found.average)]  # the first and the last are less than 1.25 apart
    assert found.p < 0.05


def test_groups_are_the_largest() -> None:
    table = {str(task): {"a": 0.9 + task / 1e3, "b": 0.5 + task / 1e3, "c": 0.1 + task / 1e3} for task in range(40)}
    found = ranks(table, ("c", "a", "b"))
    assert found is not None and found.alike == [] and list(found.average) == ["a", "b", "c"]


def test_ranks_need_two() -> None:
    assert ranks(TABLE, ("C4.5",)) is None
    assert ranks({"adult": TABLE["adult"]}, METHODS) is None


def test_pairs() -> None:
    first, second = paired(TABLE, [("C4.5+m+cf", "C4.5"), ("C4.5", "C4.5+cf")])
    differences = [row["C4.5+m+cf"] - row["C4.5"] for row in TABLE.values()]
    assert first.difference == pytest.approx(np.mean(differences))
    assert first.low < first.difference < first.high
    assert (first.wins, first.tasks) == (11.5, 14)
    assert first.p == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert first.corrected == pytest.approx(min(1, 2 * first.p)) and second.corrected == pytest.approx(max(second.p, first.corrected))
    assert first.is_significant and not second.is_significant


def test_pairs_without_difference() -> None:
    [one] = paired({"a": {"x": 1.0, "y": 1.0}}, [("x", "y")])
    assert (one.difference, one.p, one.wins) == (0.0, 1.0, 0.5)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_means() -> None:
    values = list(np.random.default_rng(0).normal(0.5, 0.1, 200))
    mean = mean_of(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (mean.value, mean.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (mean.low, mean.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert str(mean_of([0.25])) == "0.250"


def test_categories_count_once() -> None:
    scores = {"a": {"x": 1.0}, "b": {"x": 1.0}, "c": {"x": 0.0}, "d": {"y": 1.0}}
    own = complete(scores, ["x"])
    assert list(own) == ["a", "b", "c"]
    assert over_tasks(own, "x").value == pytest.approx(2 / 3)
    assert over_categories(own, "x", {"a": "one", "b": "one", "c": "two"}).value == pytest.approx(0.5)
