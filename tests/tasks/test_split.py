from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltatune.errors import InvalidValue
from deltatune.tasks.split import cut, overlap, text_key, without_duplicates
from deltatune.tasks.task import Split

LABELLED = [{"text": f"text number {index}", "label": index % 3} for index in range(100)]


def texts(parts: dict[str, list[dict[str, object]]]) -> dict[str, list[object]]:
    return {name: [row["text"] for row in rows] for name, rows in parts.items()}


def test_duplicates_and_contradictions() -> None:
    rows = [
        {"text": "same", "label": 0},
        {"text": "same", "label": 0},
        {"text": "Other  spelling", "label": 1},
        {"text": "other spelling", "label": 1},
        {"text": "both", "label": 0},
        {"text": "BOTH", "label": 1},
    ]
    kept, left_out = without_duplicates(rows, ["text"], "label")
    assert [row["text"] for row in kept if row["label"] == 0] == ["same"]
    assert {row["text"] for row in kept} == {"same", "Other  spelling"}
    assert left_out == {"duplicates": 2, "contradictions": 2}


def test_shares_hold_in_every_class() -> None:
    parts = cut(LABELLED, ["text"], "label", Split(0.1, 0.2))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 70, "validation": 9, "test": 21}
    assert Counter(row["label"] for row in parts["test"]) == {0: 7, 1: 7, 2: 7}


def test_order_of_the_source_does_not_matter() -> None:
    shuffled = random.Random(1).sample(LABELLED, len(LABELLED))
    assert texts(cut(shuffled, ["text"], "label", Split())) == texts(cut(LABELLED, ["text"], "label", Split()))


def test_a_cap_keeps_at_most_so_many_rows_and_is_a_subset() -> None:
    few = texts(cut(LABELLED, ["text"], None, Split(cap=40)))
    assert sum(map(len, few.values())) == 40
    assert set().union(*few.values()) < {row["text"] for row in LABELLED}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(alphabet="aB \n", min_size=1, max_size=6), min_size=5, max_size=60))
def test_no_text_of_test_is_in_train_in_any_spelling(values: list[str]) -> None:
    parts = cut([{"text": value, "label": 0} for value in values], ["text"], "label", Split(0.2, 0.3))
    keys = {name: {text_key(row, ["text"]) for row in rows} for name, rows in parts.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"] and not keys["validation"] & keys["test"]
    assert sum(map(len, parts.values())) == len(values)
    assert overlap(parts, ["text"]) == {"validation": 0, "test": 0}


def test_overlap_counts() -> None:
    parts = {"train": [{"text": "a"}], "validation": [{"text": "b"}], "test": [{"text": "A "}, {"text": "b"}, {"text": "c"}]}
    assert overlap(parts, ["text"]) == {"validation": 0, "test": 2}


def test_small_classes_reach_every_split() -> None:
    parts = cut(LABELLED[:9], ["text"], "label", Split(0.1, 0.1))
    assert {name: Counter(row["label"] for row in rows) for name, rows in parts.items()} == {name: {0: 1, 1: 1, 2: 1} for name in parts}


def test_shares_that_leave_nothing_to_train_on() -> None:
    with pytest.raises(InvalidValue, match="leave nothing to train on"):
        Split(0.5, 0.5)
