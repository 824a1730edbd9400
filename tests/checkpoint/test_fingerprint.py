"""The fingerprint is of the backbone alone, whatever sits on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.checkpoint.fingerprint import UNREAD, differences, fingerprint
from deltatune.methods import BitFit, FullFineTuning, LoRA
from tests.checkpoint.deltas import backbone, trained
from tests.models import MODELS

PLACES = {
    "bert": "attention.query",
    "gpt2": "c_attn",
    "t5": "encoder.attention.query",
    "mixtral": "attention.value",
    "torch_encoder": "feed_forward.up",
    "conv_net": "conv1",
    "tied_mlp": "first",
}


@pytest.mark.parametrize(("name", "place"), PLACES.items())
def test_attached_trained_and_merged_deltas_do_not_count(name: str, place: str) -> None:
    model, _ = backbone(name)
    plain = fingerprint(model)
    full = trained(model, FullFineTuning(), where="*", name="full")
    assert fingerprint(model) == plain
    dt.detach(full)
    delta = trained(model, LoRA(rank=2), where=[place], name="lora")
    assert fingerprint(model) == plain
    dt.merge(delta)
    assert fingerprint(model) == plain
    assert differences(plain, fingerprint(model)) == []


def test_heads_do_not_count() -> None:
    assert fingerprint(backbone("bert", head=1)[0]) == fingerprint(backbone("bert", head=2)[0])


def test_tied_weights_count_once() -> None:
    model, _ = MODELS["tied_mlp"]()
    assert fingerprint(model).parameters == len(list(model.parameters()))
    untied = copy.deepcopy(model)
    untied.second.weight = nn.Parameter(untied.second.weight.detach().clone())
    assert "parameters instead of" in differences(fingerprint(model), fingerprint(untied))[0]


def test_every_parameter_is_looked_at() -> None:
    model, _ = backbone("bert")
    plain = fingerprint(model)
    for name, parameter in model.named_parameters():
        if not name.startswith("classifier"):
            with torch.no_grad():
                parameter.reshape(-1)[0] += 1
                assert differences(plain, fingerprint(model)), name
                parameter.reshape(-1)[0] -= 1


def test_names_and_shapes_are_told() -> None:
    wide, narrow = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 3))
    assert differences(fingerprint(wide), fingerprint(narrow)) == [
        "its parameters have other names or shapes",
        "other types or shapes: `0.bias` is float32 3 instead of float32 2",
    ]
    named = nn.Sequential()
    named.add_module("a", nn.Linear(4, 2))
    assert differences(fingerprint(wide), fingerprint(named)) == ["it lacks `0.bias`, `0.weight`"]


def test_what_is_not_in_memory_is_not_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    plain = fingerprint(model)
    offloaded = copy.deepcopy(model).to("meta")
    assert fingerprint(offloaded).weights == UNREAD
    assert differences(plain, fingerprint(offloaded)) == []


def test_a_resized_vocabulary() -> None:
    model, _ = backbone("gpt2")
    plain = fingerprint(model)
    model.resize_token_embeddings(120, mean_resizing=False)
    found = fingerprint(model)
    assert differences(plain, found) == ["`transformer.wte.weight` has 120 vocabulary rows instead of 101"]
    assert differences(plain, found, allow_vocabulary=True) == []


def test_it_costs_no_more_with_many_deltas() -> None:
    model, _ = backbone("bert")
    for k in range(20):
        dt.attach(model, BitFit(), name=f"d{k}")
    assert fingerprint(model) == fingerprint(backbone("bert")[0])
