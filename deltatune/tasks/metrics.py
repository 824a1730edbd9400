"""Metrics by name, computed by scikit-learn and scipy, which load at the first use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.errors import DataError, missing_extra
from deltatune.registry import Registry

Score = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True)
class Metric:
    """A number for predictions against references; larger is better.

    Attributes:
        name: as tasks name it.
        score: (predictions, references) -> value.
        best: the value of a perfect predictor.
        of: the kinds of values it compares, as ``TaskType.answers`` names them.
    """

    name: str
    score: Score
    best: float = 1.0
    of: frozenset[str] = frozenset()


metrics: Registry[Metric] = Registry("metric", "metrics")


def compute(names: str | Iterable[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Each metric's value, by name.

    >>> compute("accuracy", [0, 1, 1], [0, 1, 0])
    {'accuracy': 0.6666666666666666}

    Args:
        names: one metric or several.
        predictions: one per row: a label index, a list of them, a number or a text.
        references: the same for the truth.

    Raises:
        UnknownName: no metric has one of the names.
        DataError: unequal lengths, or nothing to score.
    """
    if len(predictions) != len(references) or not len(references):
        raise DataError(f"There are {len(predictions)} predictions for {len(references)} references. Score equally many, at least one.")
    asked = [names] if isinstance(names, str) else list(names)
    return {name: metrics[name].score(predictions, references) for name in asked}


def _sklearn(function: str, **options: Any) -> Score:
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


def _correlation(function: str) -> Score:
    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        try:
            import scipy.stats
        except ImportError as cause:
            raise missing_extra("scipy", "train") from cause
        if min(len(set(predictions)), len(set(references))) < 2:
            return 0.0  # no correlation with a constant; scipy says nan
        value = float(getattr(scipy.stats, function)(predictions, references).statistic)
        return 0.0 if math.isnan(value) else value

    return score


def exact_match(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of predictions equal to their reference (or to one of several), blanks around and case aside."""

    def plain(text: Any) -> str:
        return " ".join(str(text).lower().split())

    hits = 0
    for prediction, reference in zip(predictions, references, strict=True):
        allowed = reference if isinstance(reference, list | tuple) else [reference]
        hits += plain(prediction) in {plain(one) for one in allowed}
    return hits / len(references)


_BUILT_IN: dict[str, tuple[Score, str]] = {
    "accuracy": (_sklearn("accuracy_score"), "label"),
    "f1": (_sklearn("f1_score", average="binary", zero_division=0.0), "label"),
    "f1_macro": (_sklearn("f1_score", average="macro", zero_division=0.0), "label labels"),
    "f1_micro": (_sklearn("f1_score", average="micro", zero_division=0.0), "label labels"),
    "f1_weighted": (_sklearn("f1_score", average="weighted", zero_division=0.0), "label labels"),
    "recall_macro": (_sklearn("recall_score", average="macro", zero_division=0.0), "label labels"),
    "matthews": (_sklearn("matthews_corrcoef"), "label"),
    "pearson": (_correlation("pearsonr"), "number"),
    "spearman": (_correlation("spearmanr"), "number"),
    "exact_match": (exact_match, "text tags"),
}

for _name, (_score, _of) in _BUILT_IN.items():
    metrics.register(_name)(Metric(_name, _score, of=frozenset(_of.split())))
for _name in "bleu chrf span_f1 rougeL squad_f1 rouge1 triplet_f1 sari slot_error gleu final_answer_exact_match".split():
    metrics.register(_name)(Metric(_name, exact_match, of=frozenset({"text", "tags"})))
metrics.register("exact_match_per_question")(Metric("exact_match_per_question", exact_match, of=frozenset({"label"})))
