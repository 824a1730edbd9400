"""Tokenised rows are kept and read again, and never where anything differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatune.tasks import TaskData
from deltatune.tasks.framing import Framing, HeadFraming
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training import tokens
from tests.training import tiny
from tests.training.test_types import DATA


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(tokens, "FEWEST", 10)
    return tmp_path / "tokens"


def refusing(self: Any, rows: Any) -> Any:
    raise AssertionError("they were made again")


@pytest.mark.parametrize("name", [name for name in DATA if name != "generation"])
def test_what_is_read_is_what_was_made(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framing = HeadFraming(DATA[name].task, tiny.tokenizer(), 32)
    made = tokens.encoded(framing, DATA[name])
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(HeadFraming, "encode", refusing)
    read = tokens.encoded(framing, DATA[name])
    assert read == made
    assert framing.collate(read).keys() == framing.collate(made).keys()


def test_anything_else_is_another_entry(cache: Path) -> None:
    data = tiny.data()
    other = replace(data.task, templates=(*data.task.templates, replace(data.task.templates[0], prompt="Topic: {text} :")))
    framings: list[Framing] = [
        HeadFraming(data.task, tiny.tokenizer(), 32),
        HeadFraming(data.task, tiny.tokenizer(), 16),
        TextToTextFraming(data.task, tiny.tokenizer(), 32),
        TextToTextFraming(data.task, tiny.tokenizer(), 32, encoder_decoder=True),
        TextToTextFraming(other, tiny.tokenizer(), 32, template=1),
    ]
    keys = {tokens.key(framing, data) for framing in framings}
    assert len(keys) == 5 and tokens.key(framings[0], tiny.data(train=30)) not in keys
    assert tokens.key(HeadFraming(data.task, tiny.tokenizer(), 32), data) in keys


def test_the_longest_unused_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_BYTES", 1)
    for length in (16, 24, 32):
        tokens.encoded(HeadFraming(tiny.data().task, tiny.tokenizer(), length), tiny.data())
        assert len(list(cache.iterdir())) == 1


def test_few_rows_and_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data: TaskData = tiny.data()
    framing = HeadFraming(data.task, tiny.tokenizer(), 32)
    monkeypatch.setattr(tokens, "FEWEST", 1000)
    tokens.encoded(framing, data)
    assert not cache.exists()
    monkeypatch.setattr(tokens, "FEWEST", 1)
    cache.write_text("a file where the folder should be")
    assert tokens.encoded(framing, data) == framing.encode(data.train)
