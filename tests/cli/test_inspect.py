"""``deltatune inspect --backbone``: the structure, the matches, and what would train, with no weight read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from deltatune.cli.skeleton import skeleton
from deltatune.methods import BitFit, LoRA
from deltatune.methods.kinds import methods
from tests.cli.conftest import Call, refused
from tests.training.tiny import folder


def told(call: Call, *words: object) -> dict[str, Any]:
    done = call("inspect", *words, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_roles_paths_shapes_and_counts(call: Call, encoder: str) -> None:
    shown = call("inspect", "--backbone", encoder)
    assert shown.code == 0, shown.err
    assert "0..1 BertLayer x2 layer" in shown.out
    line = next(line for line in shown.out.splitlines() if line.strip().startswith("attention.query "))
    assert line.split() == ["attention.query", "bert.encoder.layer.0..1.attention.self.query", "32x32", "2"]
    found = told(call, "--backbone", encoder)
    assert found["class"] == "BertForSequenceClassification"
    assert {site["role"] for site in found["sites"]} >= {"embedding", "attention.query", "feed_forward.down", "readout"}
    assert "trainable_parameters" not in found


def test_where_and_layers_are_tried(call: Call, encoder: str) -> None:
    found = told(call, "--backbone", encoder, "--where", "attention.{query,value}", "--where", "feed_forward.*", "--layers", "1")
    assert found["where"] == {"attention.query": 1, "attention.value": 1, "feed_forward.*": 2}
    assert {site["layer"] for site in found["sites"]} == {1}
    shown = call("inspect", "--backbone", encoder, "--where", "attention.*", "--where", "!attention.query", "--sites")
    assert shown.out.count("attention.self.key") == 2
    assert "-2" in shown.out
    refused(call("inspect", "--backbone", encoder, "--where", "attention.qurey"), "`attention.qurey`", "`attention.query`")


@pytest.mark.parametrize("method", [LoRA(rank=2), BitFit()], ids=lambda method: type(method).__name__)
def test_what_would_train_is_what_trains(method: Any, call: Call, encoder: str) -> None:
    name = methods.name_of(type(method))
    found = told(call, "--backbone", encoder, "--method", name, *(("--set", "rank=2") if name == "lora" else ()))
    budget = dt.attach(skeleton(encoder), method).budget()
    assert (found["trainable_parameters"], found["total_parameters"]) == (budget.delta, budget.N)
    shown = call("inspect", "--backbone", encoder, "--method", name, *(("--set", "rank=2") if name == "lora" else ()))
    assert f"{budget.delta:,} of {budget.N:,}" in shown.out
    assert f"+{name}" in shown.out


@pytest.mark.parametrize("name", sorted(methods))
def test_every_method_can_be_tried(name: str, call: Call, encoder: str) -> None:
    done = call("inspect", "--backbone", encoder, "--method", name, "--json")
    if done.code == 2:  # a field without a sensible default says so, and one whose default is too much for a tiny model
        assert "was asked for" in done.err or "Choose" in done.err
    else:
        assert (json.loads(done.out)["trainable_parameters"] > 0) == methods[name].trains


def test_no_weight_is_read(call: Call, encoder: str, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(encoder, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert told(call, "--backbone", bare, "--method", "lora")["trainable_parameters"] > 0


def test_the_model_is_the_one_tune_would_load(encoder: str, tmp_path: Path) -> None:
    assert type(skeleton(encoder, "bbc-news")).__name__ == "BertForSequenceClassification"
    assert skeleton(encoder, "bbc-news").get_submodule("classifier").out_features == 5
    assert type(skeleton(folder("gpt2", tmp_path))).__name__ == "GPT2LMHeadModel"
    assert type(skeleton(folder("t5", tmp_path))).__name__ == "T5ForConditionalGeneration"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = skeleton(folder("gpt2", tmp_path))
    assert model.get_submodule("lm_head").weight is model.get_submodule("transformer.wte").weight
