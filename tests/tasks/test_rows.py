from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from deltatune.tasks.rows import Rows

ROWS = Rows({"text": ["a", "b", "c"], "label": [0, 1, 0]})


def test_reading() -> None:
    assert len(ROWS) == 3
    assert ROWS["text"] == ["a", "b", "c"]
    assert ROWS[-1] == {"text": "c", "label": 0}
    assert [row["text"] for row in ROWS] == ["a", "b", "c"]
    assert list(ROWS[1:]) == [{"text": "b", "label": 1}, {"text": "c", "label": 0}]
    with pytest.raises(IndexError):
        ROWS[3]


def test_select_keeps_the_order_asked_for() -> None:
    assert ROWS.select([2, 0])["text"] == ["c", "a"]


def test_of_takes_the_named_columns() -> None:
    assert Rows.of([{"text": "a", "other": 1}], ["text"]).columns == {"text": ["a"]}
    assert len(Rows.of([], ["text"])) == 0


def test_as_datasets_and_in_a_loader() -> None:
    dataset = ROWS.to_dataset()
    assert dataset.column_names == ["text", "label"] and dataset[1] == {"text": "b", "label": 1}
    assert next(iter(DataLoader(ROWS, batch_size=3)))["label"].tolist() == [0, 1, 0]
