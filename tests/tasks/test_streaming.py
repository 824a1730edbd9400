from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from deltatune.errors import DataError, InvalidValue, MissingExtra
from deltatune.tasks import load_task
from deltatune.tasks.streaming import stream_task


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
