"""Training rows that are read while the run trains: their order, what is kept of them, and a run that was killed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import InvalidValue
from deltatune.methods import LoRA
from deltatune.tasks.framing import HeadFraming
from deltatune.tasks.streaming import stream_file
from deltatune.training.batches import Streamed
from deltatune.training.run import DataFile, load_data, read_run
from deltatune.training.settings import Settings
from deltatune.training.train import replay, train
from tests.training import tiny
from tests.training.killed import kill, run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = tiny.rows(1300, 1)
    path = tmp_path / "topics.jsonl"
    path.write_text("\n".join(json.dumps({"text": row["text"], "label": tiny.LABELS[row["label"]]}) for row in rows))
    return path


def test_batches_are_of_like_length_and_a_pass_takes_each_row_once(file: Path) -> None:
    data = stream_file(file, validation=12, test=12)
    framing = HeadFraming(data.task, tiny.tokenizer(), 32)
    assert data.stream is not None
    count = sum(1 for _ in data.stream(0))
    examples = list(islice(Streamed(framing, data.stream, 8), 2 * 16 * 8))
    assert examples == list(islice(Streamed(framing, data.stream, 8), 2 * 16 * 8))
    lengths = [len(example["input_ids"]) for example in examples]
    spans = [max(lengths[start : start + 8]) - min(lengths[start : start + 8]) for start in range(0, len(lengths), 8)]
    assert sum(spans) < 0.35 * len(spans) * (max(lengths) - min(lengths))
    whole = Counter(tuple(ids["input_ids"]) for ids in framing.encode(list(data.stream(0))))
    assert 1000 < count <= 1276
    seen = Counter(tuple(example["input_ids"]) for example in examples)
    assert all(seen[ids] <= 2 * times for ids, times in whole.items()) and seen.keys() <= whole.keys()


def test_a_run_on_a_stream_learns_and_can_be_done_again(file: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"streaming": True, "max_steps": 12, "eval_rows": 20, "test_rows": 20, "lr": 3e-3, "progress": "none"}
    backbone = tiny.folder("bert", tmp_path)
    result = train(backbone, DataFile(str(file)), LoRA(rank=2), out=tmp_path / "run", **asked)
    again = replay(read_run(tmp_path / "run"), progress="none")
    assert tiny.same(result.deltas[0].state_dict(), again.deltas[0].state_dict())
    written = read_run(tmp_path / "run")
    assert written.settings.streaming and written.fingerprint == stream_file(file, validation=20, test=20).fingerprint
    file.write_text(file.read_text() + '\n{"text": "the goal", "label": "sport"}')
    replay(written, progress="none")  # rows behind the first thousand are not looked at
    file.write_text('{"text": "of the goal", "label": "sport"}\n' + file.read_text())
    with pytest.raises(InvalidValue, match="trained on other rows"):
        replay(written, progress="none")


def test_a_killed_run_ends_with_the_same_bits(file: Path, tmp_path: Path) -> None:
    method = LoRA(rank=2, dropout=0.2)
    options: dict[str, Any] = {"streaming": True, "max_steps": 14, "own": str(file)}
    whole = run("bert", method, str(tmp_path / "whole"), **options)
    assert kill("bert", method, str(tmp_path / "broken"), "step:8", **options) == -signal.SIGKILL
    resumed = run("bert", method, str(tmp_path / "broken"), **options)
    assert tiny.same(whole.deltas[0].state_dict(), resumed.deltas[0].state_dict())
    assert whole.history == resumed.history


def test_what_cannot_be_streamed() -> None:
    asked = Settings(streaming=True, max_steps=3)
    with pytest.raises(InvalidValue, match="used with `max_steps`: a stream has no length"):
        Settings(streaming=True)
    with pytest.raises(InvalidValue, match="used without `shots`"):
        Settings(streaming=True, max_steps=3, shots=4)
    with pytest.raises(InvalidValue, match="used without `train_rows`"):
        Settings(streaming=True, max_steps=3, train_rows=4)
    with pytest.raises(InvalidValue, match="`shots` is 4; it has to be used without `train_rows`"):
        Settings(shots=4, train_rows=4)
    with pytest.raises(InvalidValue, match="used without `keep_frozen`"):
        Settings(streaming=True, max_steps=3, keep_frozen="memory")
    with pytest.raises(InvalidValue, match="A mixture draws from all rows"):
        load_data("bbc-news,tweet-sentiment", asked)
    with pytest.raises(InvalidValue, match="The rows of `tiny-topics` are all here; leave `streaming` out"):
        load_data(tiny.data(), asked)


def test_a_stream_that_is_given_wants_its_setting(file: Path) -> None:
    with pytest.raises(InvalidValue, match="are streamed; say `streaming=True`, and how many `max_steps`"):
        load_data(stream_file(file, validation=12, test=12))
