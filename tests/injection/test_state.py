"""The backbone's own state is to be had unchanged, whatever sits on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.injection.state import originals
from deltatune.methods import BitFit, FullFineTuning, LoRA
from tests.checkpoint.deltas import same, state, trained
from tests.models import MODELS


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "mixtral", "torch_encoder", "conv_net", "mlp", "tied_mlp"])
def test_the_state_is_as_before(name: str) -> None:
    model, _ = MODELS[name]()
    before = state(model)
    assert same(dt.backbone_state(model), before)
    trained(model, FullFineTuning(), where="*", name="full")
    trained(model, BitFit(), where="*", name="bitfit")
    assert not same(state(model), before)
    assert same(dt.backbone_state(model), before)
    for delta in dt.deltas(model):
        delta.disable()
    assert same(dt.backbone_state(model), before)


def test_a_merged_delta_does_not_show() -> None:
    model, _ = MODELS["bert"]()
    before = state(model)
    delta = trained(model, LoRA(rank=2))
    dt.merge(delta)
    assert not torch.equal(model.state_dict()["bert.encoder.layer.0.attention.self.query.weight"], next(iter(originals(model).values())))
    assert same(dt.backbone_state(model), before)


def test_a_copy_has_its_own() -> None:
    model, _ = MODELS["bert"]()
    before = state(model)
    trained(model, BitFit())
    clone = copy.deepcopy(model)
    assert same(dt.backbone_state(clone), before)


def test_it_loads_into_a_plain_instance() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    trained(model, LoRA(rank=2), where="0")
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plain.load_state_dict(dt.backbone_state(model), strict=True)
    assert torch.equal(plain[0].weight, model[0].weight)


def test_a_module_of_the_backbone_may_be_called_as_ours() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"deltatune": nn.Linear(2, 2)})
            self.linear = nn.Linear(2, 2)

    model = Own()
    names = list(model.state_dict())
    trained(model, LoRA(rank=1), where="linear")
    assert list(dt.backbone_state(model)) == names
