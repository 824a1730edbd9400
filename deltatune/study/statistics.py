"""Statistics over trials: means over seeds, bootstrap intervals, paired tests across tasks, average ranks. The tests are scipy's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np

from deltatune.errors import missing_extra
from deltatune.study.record import Record

K = TypeVar("K", bound=Hashable)
Scores = dict[str, dict[str, float]]
"""Task -> method -> mean score over seeds."""

DRAWS, LEVEL = 2000, 0.95
"""Of the bootstrap, and of every interval."""


@dataclass(frozen=True)
class Mean:
    """A mean with its spread.

    Attributes:
        value: the mean.
        deviation: standard deviation of the sample; None of one number.
        low: of the bootstrap interval of the mean; the mean itself of one number.
        high: of the same.
        count: numbers in the sample.
    """

    value: float
    deviation: float | None
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.deviation is None else f"±{self.deviation:.3f}")


def mean_of(values: Sequence[float], seed: int = 0) -> Mean:
    """Mean, standard deviation, and a percentile bootstrap interval of the mean.

    >>> mean_of([0.5, 0.7]).value, mean_of([0.5]).deviation
    (0.6, None)
    """
    value = fmean(values)
    if len(values) < 2:
        return Mean(value, None, value, value, len(values))
    sample = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(sample), (DRAWS, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(value, stdev(values), float(low), float(high), len(values))


def grouped(records: Iterable[Record], key: Callable[[Record], K]) -> dict[K, list[Record]]:
    """The records that have a score, by a key, in the order of its first."""
    found: dict[K, list[Record]] = defaultdict(list)
    for record in records:
        if record.score is not None:
            found[key(record)].append(record)
    return dict(found)


def scores_of(records: Iterable[Record]) -> Scores:
    """Task -> method -> mean score over seeds and whatever else differs."""
    table: Scores = {}
    for (task, method), own in grouped(records, lambda record: (record.task, record.method)).items():
        table.setdefault(task, {})[method] = fmean(record.score for record in own if record.score is not None)
    return table


def complete(scores: Scores, methods: Sequence[str]) -> Scores:
    """Only the tasks on which every one of the methods has a score, with these methods alone: what can be compared in pairs."""
    return {task: {method: row[method] for method in methods} for task, row in scores.items() if all(method in row for method in methods)}


def over_tasks(scores: Scores, method: str) -> Mean:
    """The mean over tasks."""
    return mean_of([row[method] for row in scores.values()])


def over_categories(scores: Scores, method: str, category: Mapping[str, str]) -> Mean:
    """The mean of the categories' means, so that a category with many tasks counts once."""
    found: dict[str, list[float]] = defaultdict(list)
    for task, row in scores.items():
        found[category[task]].append(row[method])
    return mean_of([fmean(values) for values in found.values()])


@dataclass(frozen=True)
class Paired:
    """One method against another, task by task.

    Attributes:
        method: the one.
        other: the other.
        difference: mean of its score minus the other's.
        low: of the bootstrap interval of that mean.
        high: of the same.
        wins: tasks on which it is better; a tie counts half.
        tasks: compared.
        p: of Wilcoxon's signed-rank test, two-sided; 1 where no task differs.
        corrected: the same after Holm, over all pairs that were compared.
    """

    method: str
    other: str
    difference: float
    low: float
    high: float
    wins: float
    tasks: int
    p: float
    corrected: float

    @property
    def is_significant(self) -> bool:
        """At the level of 5 %, corrected."""
        return self.corrected < 1 - LEVEL


def paired(scores: Scores, pairs: Sequence[tuple[str, str]]) -> list[Paired]:
    """Paired comparisons across the tasks that both methods have, corrected for their number (Wilcoxon 1945, Holm 1979)."""
    found = []
    for method, other in pairs:
        shared = complete(scores, (method, other))
        differences = [row[method] - row[other] for row in shared.values()]
        wins = sum(1.0 if one > 0 else 0.5 if one == 0 else 0.0 for one in differences)
        mean = mean_of(differences) if differences else Mean(math.nan, None, math.nan, math.nan, 0)
        found.append(Paired(method, other, mean.value, mean.low, mean.high, wins, len(differences), _wilcoxon(differences), 1.0))
    corrected = holm([one.p for one in found])
    return [Paired(**{**vars(one), "corrected": p}) for one, p in zip(found, corrected, strict=True)]


def holm(ps: Sequence[float]) -> list[float]:
    """Step-down correction: p_(i) * (m - i + 1), kept from falling.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        found[index] = largest
    return found


def _wilcoxon(differences: Sequence[float]) -> float:
    if not any(differences):
        return 1.0
    return float(_scipy().wilcoxon(differences).pvalue)


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods over tasks (Demsar 2006).

    Attributes:
        average: method -> its mean rank, the best first; ties share a rank.
        difference: two ranks that are this far apart differ at the level of 5 % (Nemenyi).
        p: of Friedman's test that all are alike.
        tasks: ranked.
    """

    average: dict[str, float]
    difference: float
    p: float
    tasks: int

    @property
    def alike(self) -> list[tuple[str, ...]]:
        """The largest groups of methods, next to each other in rank, that cannot be told apart."""
        names = list(self.average)
        groups: list[tuple[str, ...]] = []
        for start, name in enumerate(names):
            group = tuple(other for other in names[start:] if self.average[other] - self.average[name] < self.difference)
            if len(group) > 1 and not any(set(group) <= set(before) for before in groups):
                groups.append(group)
        return groups


def ranks(scores: Scores, methods: Sequence[str]) -> Ranks | None:
    """Average ranks over the tasks that all methods have; None of fewer than two methods or tasks."""
    shared = complete(scores, methods)
    if len(methods) < 2 or len(shared) < 2:
        return None
    table = np.array([[row[method] for method in methods] for row in shared.values()])  # (tasks, methods)
    places = _scipy().rankdata(-table, axis=1).mean(axis=0)
    order = np.argsort(places, kind="stable")
    p = float(_scipy().friedmanchisquare(*table.T).pvalue) if len(methods) > 2 else math.nan
    return Ranks({methods[one]: float(places[one]) for one in order}, critical_difference(len(methods), len(shared)), p, len(shared))


def critical_difference(methods: int, tasks: int, alpha: float = 0.05) -> float:
    """CD = q_alpha sqrt(k (k + 1) / (6 N)), q_alpha the studentized range over sqrt(2) (Nemenyi 1963).

    >>> round(critical_difference(4, 14), 2)
    1.25
    """
    q = float(_scipy().studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as cause:
        raise missing_extra("scipy", "study") from cause
    return stats
