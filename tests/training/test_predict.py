"""Opening and using saved deltas, and what is said where that cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.checkpoint.format import read
from deltatune.checkpoint.record import sealed
from deltatune.errors import CheckpointError, DataError, DeltaError
from deltatune.methods import LoRA
from deltatune.tasks import Rows, Task, TaskData, Template
from deltatune.training.predict import Predictor, evaluate, predict
from deltatune.training.recorded import TOLD
from deltatune.training.train import train
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("predict")
    train(tiny.folder("bert", place), tiny.data(), "lora", out=place / "run", max_steps=2, batch_size=8, progress="none")
    return place / "run"


def test_open_gives_backbone_tokenizer_and_delta(run: Path) -> None:
    backbone, tokenizer, delta = dt.open(run, name="again")
    assert not backbone.training
    assert delta.name == "again"
    assert dt.deltas(backbone) == [delta]
    assert backbone.config.id2label == {0: "sport", 1: "money", 2: "neither"}
    assert backbone(**tokenizer(["goal match"], return_tensors="pt")).logits.shape == (1, 3)
    assert tiny.same(delta.state_dict(), dt.open(run / "delta")[2].state_dict())


def test_opening_draws_no_global_random_numbers(run: Path) -> None:
    before = torch.random.get_rng_state()
    dt.open(run)
    assert torch.equal(before, torch.random.get_rng_state())


def test_texts_one_by_one_give_what_they_give_together(run: Path) -> None:
    predictor = Predictor.open(run)
    texts = ["goal match of the league", "bank", "the a of and in for on with at by the a of"]
    together, alone = predictor(texts, batch_size=2), [predictor(text)[0] for text in texts]
    assert [one.label for one in together] == [one.label for one in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
    assert predictor([{"text": "bank"}])[0] == predictor("bank")[0]


@pytest.mark.parametrize("texts", [[""], ["goal", "  "], [["one", "two"]], [{"body": "x"}]])
def test_texts_that_cannot_be_used_are_an_error(run: Path, texts: Any) -> None:
    with pytest.raises(DataError, match=r"no text in `text`|takes 1 text"):
        predict(run, texts)


def test_other_labels_are_an_error(run: Path) -> None:
    data = tiny.data()
    other = dataclasses.replace(data, task=dataclasses.replace(data.task, labels=("a", "b", "c"), templates=()))
    with pytest.raises(DataError, match="trained for the labels sport, money, neither"):
        evaluate(run, other)


def test_a_folder_without_a_delta_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no delta"):
        predict(tmp_path, "x")


def test_a_delta_that_was_not_trained_here_does_not_say_how_to_use_it(tmp_path: Path) -> None:
    model = tiny.backbone("bert")
    dt.save(dt.attach(model, LoRA(), name="own"), tmp_path / "own")
    with pytest.raises(CheckpointError, match="does not say how texts are put to it"):
        predict(tmp_path / "own", "x")
    with pytest.raises(CheckpointError, match="does not say the name of its backbone"):
        dt.open(tmp_path / "own")
    dt.save(next(iter(dt.deltas(model))), tmp_path / "named", backbone_id=tiny.folder("bert", tmp_path))
    assert dt.open(tmp_path / "named")[2].name == "own"


def test_an_edited_delta_is_an_error(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "delta"
    broken.mkdir()
    for name in ("delta.json", "delta.safetensors"):
        (broken / name).write_bytes((run / "delta" / name).read_bytes())
    record = json.loads((broken / "delta.json").read_text())
    record["sites"] = ["nowhere"]
    (broken / "delta.json").write_bytes(sealed(record))
    with pytest.raises(CheckpointError):
        predict(broken, "x")


ODD: list[Any] = [7, -1, True, "zzz", "", [], [1], ["zzz", "zzz"], {"prompt": 1}, {"prompt": "{text}", "words": "abc"}, None]


@pytest.mark.parametrize("field", ["labels", "template", "task", *TOLD])
def test_whatever_a_record_says_the_error_is_ours(field: str, run: Path, tmp_path: Path) -> None:
    record = read(run / "delta")
    _, _, delta = dt.open(run)
    about = {**dataclasses.asdict(record.about), "training": dict(record.about.training or {})}
    refused = []
    for odd in ODD:
        changed = {**about, "training": {**about["training"], field: odd}} if field in TOLD else {**about, field: odd}
        try:
            dt.save(delta, tmp_path, overwrite=True, backbone_id=record.origin.id, **changed)
            predict(tmp_path, "goal")
        except DeltaError:
            refused.append(odd)
    assert {"labels": 7, "template": 9, "task": 1, "type": 11, "label": 6}.get(field, 7) <= len(refused)


@pytest.mark.parametrize("kind", ["regression", "multilabel", "pair"])
def test_other_kinds_of_tasks(kind: str, tmp_path: Path) -> None:
    rows = tiny.data().train
    columns: dict[str, Any] = dict(rows.columns)
    labels, text, metrics = tiny.LABELS, ("text",), ("accuracy",)
    if kind == "regression":
        labels, metrics = (), ("pearson",)
        columns["label"] = [label / 2 for label in rows["label"]]
    elif kind == "multilabel":
        metrics = ("f1_micro",)
        columns["label"] = [[label, 2] if label != 2 else [2] for label in rows["label"]]
    else:
        columns |= {"second": list(reversed(rows["text"]))}
        text = ("text", "second")
    task = Task(kind, "classification" if kind == "pair" else kind, text, "label", labels=labels, metrics=metrics)  # type: ignore[arg-type]
    cut = Rows(columns)
    data = TaskData(task, cut, cut[:9], cut[:9], "made up")
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "progress": "none", "new_head": kind == "regression"}
    result = train(tiny.folder("bert", tmp_path), data, "lora", out=tmp_path / "run", **options)
    assert result.metric == metrics[0]
    [said] = predict(tmp_path / "run", [("goal", "bank")] if kind == "pair" else "goal")
    assert {"regression": float, "multilabel": list, "pair": str}[kind] is type(said.label)
    assert evaluate(tmp_path / "run", data)["score"] == pytest.approx(result.score)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_answers_of_a_task_without_labels_are_written_and_compared(name: str, tmp_path: Path) -> None:
    rows = Rows({"text": ["bank profit", "goal of the match in the league", "team"], "label": ["bank", "match of the league", "team"]})
    task = Task("echo", "text2text", ("text",), "label", metrics=("exact_match",), templates=(Template("{text} Topic:"),))
    data = TaskData(task, Rows({key: list(rows[key]) * 8 for key in ("text", "label")}), rows, rows, "made up")
    options: dict[str, Any] = {"max_steps": 60, "lr": 1e-2, "batch_size": 12, "evaluations": 1, "progress": "none"}
    result = train(tiny.folder(name, tmp_path), data, LoRA(rank=8), where="*", out=tmp_path / "run", **options)
    assert result.metric == "exact_match"
    assert result.score == 1.0
    assert [said.label for said in predict(tmp_path / "run", list(rows["text"]))] == rows["label"]
