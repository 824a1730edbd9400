"""Metrics by name: a number for predictions against references, its bootstrap interval, and whether the predictor is degenerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltatune.errors import DataError, missing_extra
from deltatune.registry import Registry
from deltatune.tasks.rows import Row

Score = Callable[[Sequence[Any], Sequence[Any]], float]
RESAMPLES = 1000
"""Bootstrap samples of a metric that is a mean over rows; of others, a tenth."""


@dataclass(frozen=True)
class Metric:
    """A number for predictions against references.

    Attributes:
        name: as tasks name it.
        score: (predictions, references) -> value.
        best: the value of a perfect predictor.
        of: the kinds of values it compares, as ``TaskType.answers`` names them.
        higher: larger is better.
        each: (prediction, reference) -> the row's own value, where the metric is their mean; intervals are then quick.
        reads: it needs the rows too, and gets each reference as (reference, row).
        alone: of several right answers each one is perfect; false where they are weighed together.
        exact: a right answer has the best value; false where the metric does not promise that.
    """

    name: str
    score: Score
    best: float = 1.0
    of: frozenset[str] = frozenset({"label"})
    higher: bool = True
    each: Callable[[Any, Any], float] | None = None
    reads: bool = False
    alone: bool = True
    exact: bool = True


metrics: Registry[Metric] = Registry("metric", "metrics", builtin="deltatune.tasks.measures")


@dataclass(frozen=True)
class Measured:
    """A metric's value with what is known of its certainty.

    Attributes:
        value: on the whole.
        low: 2.5th percentile over bootstrap samples of the rows.
        high: 97.5th percentile.
        degenerate: the predictor said the same to every row, though the truth differs.
    """

    value: float
    low: float
    high: float
    degenerate: bool = False

    def __float__(self) -> float:
        return self.value


def compute(
    names: str | Iterable[str], predictions: Sequence[Any], references: Sequence[Any], rows: Sequence[Row] | None = None
) -> dict[str, float]:
    """Each metric's value, by name.

    >>> compute("accuracy", [0, 1, 1], [0, 1, 0])
    {'accuracy': 0.6666666666666666}

    Args:
        names: one metric or several.
        predictions: one per row: a label index, a list of them, a number or a text.
        references: the same for the truth, or several that are right.
        rows: what was asked, for metrics that look at it too.

    Raises:
        UnknownName: no metric has one of the names.
        DataError: unequal lengths, nothing to score, or a metric that needs the rows.
    """
    found = _metrics(names, predictions, references)
    return {metric.name: metric.score(predictions, _seen(metric, references, rows)) for metric in found}


def measure(
    names: str | Iterable[str],
    predictions: Sequence[Any],
    references: Sequence[Any],
    rows: Sequence[Row] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Measured]:
    """The same with percentile bootstrap intervals of 95 % over the rows, and whether the predictor is degenerate.

    >>> measure("accuracy", [1, 1, 1, 1], [0, 1, 1, 1])["accuracy"].degenerate
    True

    Args:
        names: one metric or several.
        predictions: as in ``compute``.
        references: as in ``compute``.
        rows: as in ``compute``.
        resamples: bootstrap samples; a tenth of them for metrics that are no mean over rows.
        seed: of the samples.

    Raises:
        UnknownName: no metric has one of the names.
        DataError: unequal lengths, nothing to score, or a metric that needs the rows.
    """
    flag = is_degenerate(predictions, references)
    found = {}
    for metric in _metrics(names, predictions, references):
        seen = _seen(metric, references, rows)
        value, low, high = _interval(metric, predictions, seen, resamples, seed)
        found[metric.name] = Measured(value, min(low, value), max(high, value), flag)
    return found


def is_degenerate(predictions: Sequence[Any], references: Sequence[Any]) -> bool:
    """Whether all predictions are the same although the references are not.

    >>> is_degenerate([1, 1], [0, 1]), is_degenerate([1, 1], [1, 1])
    (True, False)
    """
    return len({_plain(one) for one in predictions}) == 1 and len({_plain(one) for one in references}) > 1


def _metrics(names: str | Iterable[str], predictions: Sequence[Any], references: Sequence[Any]) -> list[Metric]:
    if len(predictions) != len(references) or not len(references):
        raise DataError(f"There are {len(predictions)} predictions for {len(references)} references. Score equally many, at least one.")
    return [metrics[name] for name in ([names] if isinstance(names, str) else names)]


def _seen(metric: Metric, references: Sequence[Any], rows: Sequence[Row] | None) -> Sequence[Any]:
    if not metric.reads:
        return references
    if rows is None:
        raise DataError(f"The metric `{metric.name}` looks at what was asked too. Pass the rows: compute(..., rows=rows).")
    return list(zip(references, rows, strict=True))


def _interval(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], resamples: int, seed: int
) -> tuple[float, float, float]:
    """The value, and the ends of its interval; what each row has by itself is worked out once."""
    draw, count = np.random.default_rng(seed), len(references)
    if metric.each is not None:
        by_row = [metric.each(one, other) for one, other in zip(predictions, references, strict=True)]
        value, each = sum(by_row) / count, np.array(by_row, dtype=float)
        values = [float(each[draw.integers(count, size=count)].mean()) for _ in range(resamples)]
    else:
        value = metric.score(predictions, references)
        samples = (draw.integers(count, size=count) for _ in range(max(resamples // 10, 1)))
        values = [metric.score([predictions[k] for k in sample], [references[k] for k in sample]) for sample in samples]
    low, high = np.quantile(values, [0.025, 0.975])
    return value, float(low), float(high)


def _plain(value: Any) -> Any:
    """A value as something sets can hold."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def sklearn_score(function: str, **options: Any) -> Score:
    """A function of ``sklearn.metrics`` as a score."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        try:
            import sklearn.metrics
        except ImportError as cause:
            raise missing_extra("scikit-learn", "train") from cause
        return float(getattr(sklearn.metrics, function)(*_indicators(references, predictions), **options))

    return score


def _indicators(references: Sequence[Any], predictions: Sequence[Any]) -> tuple[Any, Any]:
    """Lists of labels -> rows of zeros and ones, as scikit-learn wants several labels; anything else as it is."""
    if not isinstance(references[0], list | tuple | set | frozenset):
        return references, predictions
    from sklearn.preprocessing import MultiLabelBinarizer

    binarizer = MultiLabelBinarizer().fit([*references, *predictions])
    return binarizer.transform(references), binarizer.transform(predictions)


def correlation(function: str) -> Score:
    """A correlation of ``scipy.stats`` as a score; with a constant there is none, which scipy calls nan and we call zero."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        try:
            import scipy.stats
        except ImportError as cause:
            raise missing_extra("scipy", "train") from cause
        if min(len(set(predictions)), len(set(references))) < 2:
            return 0.0
        value = float(getattr(scipy.stats, function)(predictions, references).statistic)
        return 0.0 if math.isnan(value) else value

    return score


def mean_of(each: Callable[[Any, Any], float]) -> Score:
    """The mean over rows of a value each row has by itself."""

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        return sum(each(one, other) for one, other in zip(predictions, references, strict=True)) / len(references)

    return score


def enter(name: str, of: str, score: Score | None = None, *, each: Callable[[Any, Any], float] | None = None, **options: Any) -> None:
    """Register a metric: by its score, or by the value each row has by itself."""
    made = score or (mean_of(each) if each else None)
    assert made is not None
    metrics.register(name)(Metric(name, made, of=frozenset(of.split()), each=each, **options))


def right_ones(reference: Any) -> list[str]:
    """All right answers of a row as texts."""
    return [str(one) for one in reference] if isinstance(reference, list | tuple) else [str(reference)]
