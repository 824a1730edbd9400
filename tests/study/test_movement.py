"""The procedure ``movement``: how far each kind of bias moved, and what undoing it does; killed in between, it trains once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import deltatune.study.procedures.train as training
from deltatune.study.design import Study
from deltatune.study.procedures import procedures
from deltatune.study.procedures.movement import MOVED
from deltatune.study.trial import Outcome, Trial

KINDS = {
    "other", "attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up",
    "feed_forward.down", "norm attention.output.LayerNorm.bias", "norm output.LayerNorm.bias", "norm bert.embeddings.LayerNorm.bias",
}  # fmt: skip


@pytest.fixture(scope="module")
def trial(tiny: Study) -> Trial:
    one = next(one for one in tiny.trials() if one.label == "bitfit")
    return dataclasses.replace(one, procedure="movement")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("movement")


@pytest.fixture(scope="module")
def outcome(trial: Trial, place: Path) -> Outcome:
    return procedures["movement"](trial, place)


def test_every_kind_has_its_lines(outcome: Outcome) -> None:
    lines = outcome.numbers["movement"]
    assert {line["kind"] for line in lines} == KINDS
    moved = {(line["kind"], line["layer"]): line for line in lines}
    assert {layer for kind, layer in moved if kind == "attention.query"} == {0, 1}
    assert all(line["change"] >= 0 and line["size"] in (32, 48) for line in lines)
    query, key = (sum(moved[f"attention.{name}", layer]["change"] for layer in (0, 1)) for name in ("query", "key"))
    assert query > key  # nothing flows to the key's bias but rounding


def test_what_is_undone_is_done_again(outcome: Outcome) -> None:
    undone = outcome.numbers["undone"]
    assert undone["none"]["score"] == outcome.numbers["score"] and undone["none"]["same"] == 1.0
    assert undone["attention.key"] == undone["none"]  # the softmax does not see it
    assert set(undone) == {line["kind"] for line in outcome.numbers["movement"]} | {"none", "all"}


def test_what_is_trained_is_not_trained_again(trial: Trial, place: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "dt_train", None)
    (place / MOVED).unlink()
    again = procedures["movement"](trial, place)
    assert again.numbers["movement"] == outcome.numbers["movement"] and again.history == outcome.history
