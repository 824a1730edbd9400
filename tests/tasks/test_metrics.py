from __future__ import annotations

import pytest
import sklearn.metrics

from deltatune.errors import DataError, UnknownName
from deltatune.tasks.metrics import compute, metrics

TRUTH = [0, 1, 2, 2, 1, 0]
GUESS = [0, 2, 2, 2, 1, 1]


def test_against_values_worked_out_by_hand() -> None:
    assert compute("accuracy", GUESS, TRUTH)["accuracy"] == pytest.approx(4 / 6)
    # f1 of class 0: 2/3, of class 1: 1/2, of class 2: 4/5
    assert compute("f1_macro", GUESS, TRUTH)["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    assert compute("recall_macro", GUESS, TRUTH)["recall_macro"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert compute("matthews", [1, 1, 0, 0], [1, 0, 1, 0])["matthews"] == 0.0
    assert compute("f1", [1, 1, 0, 0], [1, 0, 0, 1])["f1"] == pytest.approx(0.5)
    assert compute("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson"] == pytest.approx(1.0)
    assert compute("spearman", [1.0, 2.0, 30.0], [3.0, 2.0, 1.0])["spearman"] == pytest.approx(-1.0)


@pytest.mark.parametrize("name", list(metrics))
def test_a_perfect_predictor_reaches_the_best_value(name: str) -> None:
    truth = {"pearson": [0.5, 1.0, 3.0], "spearman": [0.5, 1.0, 3.0], "exact_match": ["a", "b"]}.get(name, [0, 1, 1, 0])
    assert compute(name, truth, truth)[name] == pytest.approx(metrics[name].best)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_a_constant_predictor_has_no_correlation(name: str) -> None:
    assert compute(name, [1, 1, 1], [0, 1, 1]) == {name: 0.0}


def test_several_labels_per_row() -> None:
    truth, guess = [[0, 2], [1], []], [[0], [1], [2]]
    matrix = [[1, 0, 1], [0, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    expected = sklearn.metrics.f1_score(*matrix, average="micro")
    assert compute("f1_micro", guess, truth)["f1_micro"] == pytest.approx(expected) == pytest.approx(2 / 3)


def test_exact_match_with_several_right_answers() -> None:
    assert compute("exact_match", ["The  Cat", "dog", "x"], ["the cat", ["cat", "Dog"], "y"]) == {"exact_match": pytest.approx(2 / 3)}


def test_errors() -> None:
    with pytest.raises(UnknownName, match=r"No metric is called `acuracy`. Did you mean `accuracy`"):
        compute("acuracy", [1], [1])
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        compute("accuracy", [1], [1, 0])
    with pytest.raises(DataError, match="0 predictions"):
        compute("accuracy", [], [])
