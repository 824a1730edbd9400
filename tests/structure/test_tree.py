"""The folded tree, as data and drawn."""

from __future__ import annotations

import io
import json

import pytest
import torch
import transformers
from torch import nn

from deltatune.structure.tree import Branch, outline, tree
from tests.models import MODELS


def find(branch: Branch, *names: str) -> Branch:
    for name in names:
        (branch,) = [child for child in branch.children if child.name == name]
    return branch


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_backbone(name: str) -> None:
    model, _ = MODELS[name]()
    frozen = list(model.parameters())[::2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    root = outline(model)
    assert root.total == sum(parameter.numel() for parameter in model.parameters())
    assert root.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert json.loads(json.dumps(root.as_dict()))["class"] == type(model).__name__


def test_equal_layers_are_folded() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    layers = find(outline(model), "encoder", "layer")
    (folded,) = layers.children
    assert (folded.name, folded.repeats, folded.roles) == ("0..11", 12, ("layer",))
    query = find(folded, "attention", "self", "query")
    assert query.shapes == (("weight", (768, 768)), ("bias", (768,)))
    assert query.roles == ("attention.query",)
    assert layers.total == 12 * folded.total


def test_a_layer_that_differs_is_not_folded() -> None:
    model, _ = MODELS["bert"]()
    model.bert.encoder.layer[0].requires_grad_(False)
    assert [child.name for child in find(outline(model), "bert", "encoder", "layer").children] == ["0", "1"]
    mixed, _ = MODELS["qwen3_moe"]()
    assert [child.name for child in find(outline(mixed), "model", "layers").children] == ["0", "1"]


def test_roles_of_fused_projections_and_ties() -> None:
    root = outline(MODELS["gpt2"]()[0])
    assert find(root, "transformer", "h", "0..1", "attn", "c_attn").roles == ("attention.query", "attention.key", "attention.value")
    assert find(root, "lm_head").tied
    assert find(root, "lm_head").total == 0
    assert find(root, "transformer", "wte").total == 101 * 32


class Slot(nn.Module):
    """Stands for the engine's slot: a child called ``deltatune`` with patches under the names of deltas."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.patches = nn.ModuleDict({name: nn.Linear(1, 1) for name in names})


def test_deltas_are_marked_and_are_no_part_of_the_backbone() -> None:
    model, _ = MODELS["gpt2"]()
    plain = outline(model)
    model.transformer.h[1].attn.c_attn.add_module("deltatune", Slot("sst2", "sst2/1", "mnli"))
    root = outline(model)
    assert root.total == plain.total
    assert [child.name for child in find(root, "transformer", "h").children] == ["0", "1"]
    assert find(root, "transformer", "h", "1", "attn", "c_attn").deltas == ("sst2", "mnli")


def test_the_drawing_names_classes_shapes_roles_deltas_and_what_trains() -> None:
    console_of = pytest.importorskip("rich.console").Console
    model, _ = MODELS["gpt2"]()
    model.requires_grad_(False)
    model.transformer.h[1].ln_1.requires_grad_(True)
    model.transformer.h[1].attn.c_attn.add_module("deltatune", Slot("sst2"))
    console = console_of(width=160, file=io.StringIO())
    console.print(tree(model))
    lines = [line.strip(" │├└─") for line in console.file.getvalue().splitlines()]
    assert lines[0] == "GPT2LMHeadModel 64 of 20,352 train 2 added"
    assert "0 GPT2Block layer frozen" in lines
    assert "c_attn Conv1D 32x96 attention.query, attention.key, attention.value +sst2 frozen 2 added" in lines
    assert "ln_1 LayerNorm 32 norm trains" in lines
    assert "lm_head Linear 101x32 tied lm_head" in lines
