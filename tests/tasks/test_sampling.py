from __future__ import annotations

from collections import Counter

import pytest

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks import Rows, Task, k_shot, load_task, subset
from deltatune.tasks.loading import TaskData
from deltatune.tasks.sampling import SEEDS, fewer

DRAWN = "c06ae3ae11eee598"


@pytest.fixture(scope="module")
def news() -> TaskData:
    return load_task("bbc-news")


def test_k_shot_is_balanced_and_disjoint(news: TaskData) -> None:
    few = k_shot(news, shots=16, seed=42)
    assert Counter(few.train["label"]) == Counter(few.validation["label"]) == dict.fromkeys(range(5), 16)
    assert not set(few.train["text"]) & set(few.validation["text"])
    assert set(few.train["text"]) | set(few.validation["text"]) <= set(news.train["text"])
    assert few.test is news.test and few.notes[-1] == "16 shots, seed 42"


def test_k_shot_is_the_same_everywhere(news: TaskData) -> None:
    assert k_shot(news, shots=2, seed=13).fingerprint[:16] == DRAWN
    assert k_shot(news, shots=2, seed=21).train["text"] != k_shot(news, shots=2, seed=13).train["text"]


def test_a_smaller_k_is_part_of_a_larger(news: TaskData) -> None:
    assert set(k_shot(news, shots=4).train["text"]) < set(k_shot(news, shots=8).train["text"])


def test_too_many_shots(news: TaskData) -> None:
    with pytest.raises(DataError, match=r"class `.*` of `bbc-news` has \d+ training rows; 200 shots and as many for validation need 400"):
        k_shot(news, shots=200)
    with pytest.raises(InvalidValue, match="`shots` is 0"):
        k_shot(news, shots=0)


def test_subset(news: TaskData) -> None:
    few = subset(news.task, news.test, 20)
    assert len(few) == 20 and set(few["text"]) < set(news.test["text"])
    assert few["text"] == subset(news.task, news.test, 30)["text"][:20]
    assert subset(news.task, news.test, 9999) is news.test
    with pytest.raises(InvalidValue, match="`most` is 0"):
        subset(news.task, news.test, 0)


def test_fewer_training_rows(news: TaskData) -> None:
    few, more = fewer(news, 20), fewer(news, 30)
    assert few.train["text"] == more.train["text"][:20] and few.validation is news.validation and few.test is news.test
    assert few.notes[-1] == f"20 of {len(news.train)} training rows, seed 13"
    assert fewer(news, 20, seed=21).train["text"] != few.train["text"] and fewer(few, 20).train["text"] == few.train["text"]
    assert fewer(news, 99_999).notes == news.notes


def test_customary_numbers_of_shots(news: TaskData) -> None:
    assert Counter(k_shot(news, seed=SEEDS[0]).train["label"]) == dict.fromkeys(range(5), 16)
    task = Task("free", "generation", ("text",), "target")
    rows = Rows({"text": [str(k) for k in range(80)], "target": ["x"] * 80})
    few = k_shot(TaskData(task, rows, rows, rows, "made up"))
    assert len(few.train) == len(few.validation) == 32 and few.notes == ("32 shots, seed 13",)
    assert SEEDS == (13, 21, 42, 87, 100)
