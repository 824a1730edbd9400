"""What scoring shows while it goes on."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch

import deltatune as dt
from deltatune.tasks import Rows, Task, TaskData
from deltatune.tasks.framing import HeadFraming, How, framings
from deltatune.tasks.tensors import by_length
from deltatune.training import watch
from deltatune.training.evaluation import score_rows
from deltatune.training.watch import Show, watching
from tests.training import tiny
from tests.training.test_mixture import both
from tests.training.test_types import DATA

BATCHES = [[0, 2], [1, 3], [4]]
TEXTS = Rows({"text": tiny.rows(9, 3)["text"]})
PLAIN = TaskData(Task("texts", "plain", ("text",), "text", metrics=("perplexity",)), TEXTS, TEXTS, TEXTS, "made up")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    file = io.StringIO()
    with watching("scoring", file) as watched:
        assert list(watched(BATCHES)) == BATCHES
    first, second = file.getvalue().splitlines()
    assert first.startswith("scoring 2/5: ") and second.startswith("scoring 4/5: ")
    assert "rows/s" in first and first.endswith(" left")


def test_each_scoring_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    file = io.StringIO()
    with watching("scoring", file) as watched:
        assert [*watched(BATCHES), *watched(BATCHES)] == BATCHES * 2
    assert [line.split(":")[0] for line in file.getvalue().splitlines()] == ["scoring 2/5", "scoring 4/5"] * 2


def test_what_is_quick_shows_nothing() -> None:
    file = io.StringIO()
    with watching("scoring", file) as watched:
        assert list(watched(BATCHES)) == BATCHES
    assert file.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    file = Terminal()
    with watching("scoring", file) as watched:
        assert list(watched(BATCHES)) == BATCHES
    assert "scoring" in file.getvalue() and "5/5" in file.getvalue()


def test_inputs_of_like_length_share_a_batch() -> None:
    assert by_length([{"input_ids": [0] * length} for length in (3, 1, 2)], 2) == [[1, 2], [0]]


def test_a_score_is_the_same_whether_or_not_somebody_watches() -> None:
    seen: list[list[int]] = []

    def watched(batches: list[list[int]]) -> list[list[int]]:
        seen.extend(batches)
        return batches

    data, model = tiny.data(), tiny.backbone("bert")
    framing = HeadFraming(data.task, tiny.tokenizer())
    with torch.random.fork_rng():
        assert score_rows(framing, model, data.test, 4, watched) == score_rows(framing, model, data.test, 4)
    assert sorted(row for batch in seen for row in batch) == list(range(len(data.test)))


@pytest.mark.parametrize("name", ["head", "text2text", "written", "mixture", "plain"])
def test_every_framing_is_watched(name: str) -> None:
    data = {"head": DATA["choice"], "written": DATA["generation"], "mixture": both(), "plain": PLAIN}.get(name, tiny.data())
    model = tiny.backbone("bert" if name == "head" else "llama")
    framing = framings[{"written": "text2text"}.get(name, name)].make(data.task, tiny.tokenizer(), How(64, "decoder"))
    seen: list[list[int]] = []

    def watched(batches: Sequence[list[int]]) -> Sequence[list[int]]:
        seen.extend(batches)
        return batches

    assert framing.judged(model, data.test, 4, watch=watched) == framing.judged(model, data.test, 4)
    assert sum(map(len, seen)) == len(data.test) and max(map(len, seen)) == 4


@pytest.mark.parametrize(("show", "told"), [("lines", True), ("none", False)])
def test_a_run_tells_of_its_test_rows(show: Show, told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.0)
    model, data = tiny.backbone("bert"), tiny.data()
    dt.train(model, data, "linear-probe", tokenizer=tiny.tokenizer(), max_steps=1, eval_batch_size=4, progress=show)
    assert ("test rows 4/12: " in capsys.readouterr().err) is told
