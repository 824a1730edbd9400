"""Several tasks in one training: shares, order, scores, and asking the delta afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.tasks import Rows, Task, TaskData, Template
from deltatune.tasks.framing import How
from deltatune.tasks.mixture import MixtureFraming, load_mixture, mixed, shares
from deltatune.training.predict import evaluate, predict
from deltatune.training.run import load_data
from deltatune.training.settings import Settings
from deltatune.training.train import train
from tests.training import tiny


def echo(count: int = 9) -> TaskData:
    """A task that is generated, beside one that is scored."""
    rows = tiny.rows(count, 4)
    task = Task("echo", "generation", ("text",), "word", metrics=("exact_match",), templates=(Template("{text} :"), Template(": {text} :")))
    made = Rows({"text": rows["text"], "word": [text.split()[0] for text in rows["text"]]})
    return TaskData(task, made, made[:3], made[:3], "made up")


def both(temperature: float = 1.0) -> TaskData:
    return mixed([tiny.data(), echo()], temperature)


def test_shares_add_up_whatever_the_temperature() -> None:
    assert shares([36, 9], 1.0) == [36, 9]
    assert shares([36, 9], 2.0) == [30, 15]
    for temperature in (1.0, 1.5, 3.0, 100.0):
        assert sum(shares([7, 31, 2], temperature)) == 40


def test_each_row_once_at_temperature_one() -> None:
    data = both()
    assert Counter(data.train["part"]) == {0: 36, 1: 9}
    texts = [row["text"] for part, row in zip(data.train["part"], data.train["row"], strict=True) if part == 1]
    assert sorted(texts) == sorted(echo().train["text"])
    assert data.train["part"] != sorted(data.train["part"])
    assert both().fingerprint == data.fingerprint != both(2.0).fingerprint
    assert Counter(both(2.0).train["part"]) == {0: 30, 1: 15}
    assert data.task.name == "tiny-topics+echo" and data.notes[0] == "temperature 1: 36 rows of tiny-topics, 9 rows of echo"


def test_each_row_is_put_as_its_own_task_is() -> None:
    data = both()
    framing = MixtureFraming.make(data.task, tiny.tokenizer(), How(32, "decoder"))
    features = framing.encode(data.train)
    for part, row, feature in zip(data.train["part"], data.train["row"], features, strict=True):
        assert feature == framing.parts[part].encode([row])[0]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_mixture_is_trained_scored_and_asked(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "evaluations": 1, "progress": "none", "template": 0}
    result = train(tiny.folder(name, tmp_path), both(), "lora", out=tmp_path / "run", **options)
    assert result.metric == "mean"
    assert result.score == pytest.approx((result.metrics["tiny-topics.accuracy"] + result.metrics["echo.exact_match"]) / 2)
    assert result.intervals["mean"][0] <= result.score <= result.intervals["mean"][1]
    assert evaluate(tmp_path / "run", both())["score"] == pytest.approx(result.score)
    said = predict(tmp_path / "run", [("tiny-topics", "goal"), {"task": "echo", "text": "bank"}])
    assert said[0].label in tiny.LABELS and isinstance(said[1].label, str)
    with pytest.raises(DataError, match="`ecco` is none of them"):
        predict(tmp_path / "run", [("ecco", "bank")])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="two or more different tasks"):
        load_mixture(["bbc-news", "bbc-news"])
    with pytest.raises(InvalidValue, match="has to be 1 or more"):
        load_mixture(["bbc-news", "tweet-sentiment"], temperature=0.5)
    with pytest.raises(Unsupported, match="mixes tasks whose answers differ, so no head fits it"):
        train(tiny.folder("bert", tmp_path), both(), "lora", progress="none")
    headless = replace(tiny.data(), task=replace(tiny.data().task, templates=()))
    with pytest.raises(Unsupported, match="`tiny-topics` has no template"):
        MixtureFraming.make(mixed([headless, echo()]).task, tiny.tokenizer(), How(32, "decoder"))


def test_names_with_commas_are_a_mixture() -> None:
    data = load_data("bbc-news, tweet-sentiment", Settings(temperature=3.0))
    assert [part.name for part in data.task.parts] == ["bbc-news", "tweet-sentiment"]
    assert data.notes[0].startswith("temperature 3")
