"""The procedures ``ensemble`` and ``templates`` on a tiny decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune.study.procedures.train as training
from deltatune.errors import Unsupported
from deltatune.methods import Frozen, PromptTuning
from deltatune.study.procedures import procedures
from deltatune.study.procedures.ensemble import VOTED, majority
from deltatune.study.procedures.templates import changed
from deltatune.study.trial import Trial
from deltatune.tasks import Template
from deltatune.training.run import DataFile, Run
from deltatune.training.settings import Settings
from tests.cli.conftest import write_texts
from tests.training.tiny import folder

SETTINGS = Settings(max_steps=3, batch_size=4, lr=0.05, evaluations=0, eval_batch_size=16, framing="text2text")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ensemble")


def trial(place: Path, backbone: str, procedure: str, method: Any, **options: Any) -> Trial:
    data = DataFile(str(write_texts(place / "headlines.csv")), "headline", "topic")
    return Trial(Run(folder(backbone, place), data, (method,), settings=SETTINGS), "m", procedure, options=options)


def test_an_ensemble_votes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(place, "llama", "ensemble", PromptTuning(num_virtual_tokens=3), members=3)
    outcome = procedures["ensemble"](one, place / "trial")
    told = outcome.numbers["ensemble"]
    members = [place / "trial" / f"member-{number}" for number in range(3)]
    assert told["singles"] == pytest.approx([training.finished(one, member / "run", 0.0).numbers["score"] for member in members])
    assert told["best"] == max(told["singles"]) and 0 <= outcome.numbers["score"] <= 1
    assert all(len(pair) == 2 and min(pair) > 0 for pair in told["rounds"])
    assert outcome.numbers["trainable_parameters"] == 3 * 3 * 32
    monkeypatch.setattr(training, "dt_train", None)  # a trial that goes on trains no member twice
    (place / "trial" / VOTED).unlink()
    assert procedures["ensemble"](one, place / "trial").numbers["score"] == outcome.numbers["score"]


def test_votes_decide_and_probabilities_where_they_are_equal() -> None:
    shares = torch.tensor([[[0.9, 0.1, 0.0]], [[0.4, 0.6, 0.0]], [[0.4, 0.6, 0.0]]])
    assert int(majority(shares.clamp(min=1e-9).log())[0].argmax()) == 1  # two votes against one, though less likely on average
    assert int(majority(shares[:2].clamp(min=1e-9).log())[0].argmax()) == 0  # a vote each


def test_an_encoder_has_no_words_to_vote_with(place: Path) -> None:
    one = trial(place, "bert", "ensemble", PromptTuning(num_virtual_tokens=3), members=2)
    one = dataclasses.replace(one, run=dataclasses.replace(one.run, settings=dataclasses.replace(SETTINGS, framing="auto", max_steps=1)))
    with pytest.raises(Unsupported, match="votes by label words"):
        procedures["ensemble"](one, place / "encoder")


@pytest.mark.parametrize("method", [Frozen(), PromptTuning(num_virtual_tokens=3)])
def test_templates_are_changed_by_a_word(place: Path, method: Any) -> None:
    one = trial(place, "llama", "templates", method)
    numbers = procedures["templates"](one, place / type(method).__name__).numbers
    own, *others = numbers["templates"]
    assert own["change"] == "own" and own["score"] == pytest.approx(numbers["score"])
    assert others and all("->" in other["change"] and other["prompt"] != own["prompt"] for other in others)


def test_changed_templates() -> None:
    found = dict(changed(Template("Tweet: {text}\nIs the feeling good? It is")))
    assert found["Tweet -> Message"].prompt == "Message: {text}\nIs the feeling good? It is"
    assert found["good -> nothing"].prompt == "Tweet: {text}\nIs the feeling? It is"
    assert found["It -> nothing"].prompt == "Tweet: {text}\nIs the feeling good? is"
    assert len(found) == 7  # each word has its turn
