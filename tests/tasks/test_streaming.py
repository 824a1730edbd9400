from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from deltatune.errors import DataError, InvalidValue, MissingExtra
from deltatune.tasks import load_task
from deltatune.tasks.streaming import stream_data, stream_file, stream_task


def test_the_rows_are_those_of_the_whole_task(mirror: Path) -> None:
    whole = load_task("glue-sst2")
    for split in ("train", "test"):
        assert list(stream_task("glue-sst2", split)) == list(whole.splits[split])
    assert list(islice(stream_task("glue-sst2"), 5)) == list(whole.train[:5])


def test_shuffled(mirror: Path) -> None:
    order = [row["sentence"] for row in stream_task("glue-sst2", shuffle=100, seed=1)]
    plain = [row["sentence"] for row in stream_task("glue-sst2")]
    assert order != plain and sorted(order) == sorted(plain)
    assert order == [row["sentence"] for row in stream_task("glue-sst2", shuffle=100, seed=1)]
    assert max(plain.index(text) for text in order[:50]) < 200


def test_refusals(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cut from all of its rows"):
        stream_task("bbc-news")
    with pytest.raises(InvalidValue, match="there are train, validation, test"):
        stream_task("glue-sst2", "dev")
    monkeypatch.setenv("DELTATUNE_MIRROR", "/nowhere")
    monkeypatch.setattr("deltatune.tasks.sources.hub_answers", lambda: False)
    with pytest.raises(MissingExtra, match=r"Looked for `/nowhere/nyu-mll/glue/sst2/train.parquet` first"):
        next(stream_task("glue-sst2"))


def test_a_streamed_task_scores_what_the_loaded_one_does(mirror: Path) -> None:
    whole, data = load_task("trec-coarse"), stream_data("trec-coarse", seed=3)
    assert list(data.test) == list(whole.test) and list(data.validation) == list(whole.validation)
    assert data.stream is not None and list(data.train) == list(whole.train)[:1000]
    first, again, second = (list(data.stream(number)) for number in (0, 0, 1))
    assert first == again != second
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(map(str, whole.train))
    assert data.fingerprint == stream_data("trec-coarse", seed=4).fingerprint != stream_data("trec-coarse", validation=9).fingerprint
    assert data.source.endswith(", streamed")


def test_what_a_source_lacks_is_held_back_and_never_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": "yes" if number % 3 else "no"} for number in range(4000)]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = stream_file(file, validation=50, test=80)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1000, "validation": 50, "test": 80}
    assert data.task.labels == ("no", "yes") and data.notes[1] == "80 rows of test are held back from train"
    held = {row["text"] for split in (data.validation, data.test) for row in split}
    assert data.stream is not None
    trained = [row["text"] for row in data.stream(0)]
    assert len(held) == 130 and len(trained) == 3870 and held.isdisjoint(trained)
    assert data.task.labels[data.train[0]["label"]] == "no"  # the first row of the file


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{"text": " ", "label": "x"}', "no text in column `text` of row 3"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', "no label in column `label` of row 2"),
        ('{"text": "a", "lable": "x"}', "no column `label` for the label.*Did you mean `lable`"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n{', "line 3 is not JSON"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}', "The split `validation` of `own` is empty when it is streamed"),
    ],
)
def test_a_file_that_cannot_be_streamed(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        stream_file(tmp_path / "own.jsonl")
