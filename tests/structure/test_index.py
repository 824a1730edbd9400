"""The index: all sites once, ties, parameters that modules read themselves, containers, what deltas put there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltatune.errors import Unsupported
from deltatune.structure.index import Index, index
from deltatune.structure.site import LayerList
from tests.models import HIDDEN, MODELS, output


@pytest.mark.parametrize("name", MODELS)
def test_each_module_is_a_site_once_and_in_module_order(name: str) -> None:
    model, _ = MODELS[name]()
    index_ = index(model)
    whole = [site for site in index_ if site.rows is None and site.parameter is None]
    assert [(site.path, site.module) for site in whole] == list(model.named_modules())
    assert len({site.key for site in index_}) == len(index_)
    for site in index_:
        assert index_[site.key] is site
        assert site.module_path in dict(model.named_modules())
        assert dict(model.named_modules())[site.module_path] is site.module
        if site.parameter is not None:
            assert model.get_parameter(site.path) is site.weight


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_owners(name: str) -> None:
    model, _ = MODELS[name]()
    index_ = index(model)
    for parameter in model.parameters():
        owners = index_.owners(parameter)
        paths = [path for path, other in model.named_parameters(remove_duplicate=False) if other is parameter]
        assert sorted(path for _, _, path in owners) == sorted(paths)
        assert all(module._parameters[attribute] is parameter for module, attribute, _ in owners)


TIED = {
    "gpt2": {"transformer.wte", "lm_head"},
    "opt": {"model.decoder.embed_tokens", "lm_head"},
    "gemma3": {"model.embed_tokens", "lm_head"},
    "bloom": {"transformer.word_embeddings", "lm_head"},
    "t5": {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"},
    "bart": {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"},
    "tied_mlp": {"first", "second"},
}


@pytest.mark.parametrize("name", MODELS)
def test_tied_weights_are_seen(name: str) -> None:
    model, _ = MODELS[name]()
    assert {site.path for site in index(model) if site.tied} == TIED.get(name, set())


def test_owners_stay_right_when_parameters_are_replaced() -> None:
    model, _ = MODELS["tied_mlp"]()
    index_ = index(model)
    model.first.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
    assert [path for _, _, path in index_.owners(model.first.weight)] == ["first.weight"]
    assert [path for _, _, path in index_.owners(model.second.weight)] == ["second.weight"]


def test_a_copy_of_the_index_belongs_to_the_copy() -> None:
    model, _ = MODELS["tied_mlp"]()
    both = copy.deepcopy((model, index(model)))
    owners = both[1].owners(both[0].first.weight)
    assert [module for module, _, _ in owners] == [both[0].first, both[0].second]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_to_be_reached_with_a_role_is_called(name: str) -> None:
    model, inputs = MODELS[name]()
    called: set[int] = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.add(id(module)))
    with torch.no_grad():
        output(model, inputs)
    sites = [site for site in index(model) if site.role is not None]
    assert all(site.reached and id(site.module) in called for site in sites)
    silent = {site.path for site in index(model) if not site.reached}
    assert all(id(model.get_submodule(path)) not in called or isinstance(model.get_submodule(path), nn.Sequential) for path in silent)


def test_modules_that_are_never_called() -> None:
    def unreached(name: str) -> set[str]:
        return {site.path for site in index(MODELS[name]()[0]) if not site.reached}

    assert unreached("torch_encoder") == {"layers", "layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"}
    assert unreached("mlp") == {"", "2"}
    assert "shared" in unreached("t5")
    assert "model.shared" in unreached("bart")
    assert unreached("deberta_v2") == {"deberta.encoder.layer", "deberta.encoder.rel_embeddings"}
    assert unreached("llama") == {"model.layers"}


def test_parameters_that_a_module_reads_itself() -> None:
    raw = {name: {site.path: site.role for site in index(MODELS[name]()[0]) if site.parameter} for name in MODELS}
    assert set(raw["vit"]) == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert raw["deberta_v2"] == {"deberta.encoder.rel_embeddings.weight": None}
    assert len(raw["mixtral"]) == 4
    assert raw["torch_encoder"]["layers.0.self_attn.out_proj.weight"] == "attention.output"
    assert [name for name in raw if raw[name]] == ["deberta_v2", "mixtral", "qwen3_moe", "vit", "torch_encoder"]


def test_sites_whose_rows_are_not_a_multiple_of_the_batch() -> None:
    model, inputs = MODELS["deberta_v2"]()
    rows: dict[str, set[int]] = {}
    for site in index(model):
        if site.role and site.parameter is None and site.role not in ("layer", "stack", "attention"):
            site.module.register_forward_pre_hook(lambda module, args, path=site.path: rows.setdefault(path, set()).add(args[0].shape[0]))
    with torch.no_grad():
        output(model, inputs)
    batch = inputs["input_ids"].shape[0]
    strange = {path for path, sizes in rows.items() if sizes != {batch} and path != "deberta.encoder.LayerNorm"}
    found = {site.path for site in index(model) if not site.routable}
    assert found == strange | {"deberta.encoder.LayerNorm"}
    assert len(found) == 5


def test_what_deltas_put_there_is_no_site() -> None:
    model, _ = MODELS["bert"]()
    before = [site.key for site in index(model)]
    model.bert.encoder.layer[0].attention.self.query.add_module("deltatune", nn.Linear(2, 2))
    model.add_module("deltatune", nn.ModuleDict({"x": nn.Linear(2, 2)}))
    assert [site.key for site in index(model)] == before


def test_a_module_under_two_names_is_one_site() -> None:
    linear = nn.Linear(4, 4)
    index_ = index(nn.ModuleDict({"a": linear, "b": linear}))
    assert [site.path for site in index_ if site.path] == ["b"]
    assert not index_["b"].tied


def test_lookup_by_key() -> None:
    index_ = Index(MODELS["gpt2"]()[0])
    assert index_["transformer.h.1.attn.c_attn:value"].role == "attention.value"
    assert index_["transformer.h.1.attn.c_attn"].role is None
    assert "transformer.h.1.attn.c_attn:up" not in index_
    with pytest.raises(KeyError):
        index_["nothing"]
    assert index_.layer_list(index_["transformer.h.1.attn.c_attn:value"]) == "transformer.h"
    assert index_.layer_list(index_["lm_head"]) is None


def test_widths() -> None:
    gpt2 = Index(MODELS["gpt2"]()[0])
    assert (gpt2["transformer.h.0.mlp.c_fc"].in_features, gpt2["transformer.h.0.mlp.c_fc"].out_features) == (32, 48)
    assert gpt2["transformer.h.0.mlp.c_fc"].transposed
    assert gpt2["transformer.h.0.attn.c_attn:key"].out_features == 32
    assert gpt2["transformer.h.0.ln_1"].out_features == 32
    conv = Index(MODELS["conv_net"]()[0])
    assert (conv["conv2"].in_features, conv["conv2"].out_features) == (8, 16)
    mixtral = Index(MODELS["mixtral"]()[0])
    assert mixtral["model.layers.0.mlp.experts.down_proj"].in_features == 48
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"].out_features == 96
    with pytest.raises(Unsupported, match="has no weight of its own"):
        _ = gpt2["transformer.h.0"].in_features


@pytest.mark.parametrize(
    ("model", "path", "side"), [("bert", "bert.encoder.layer", ""), ("opt", "model.decoder.layers", ""), ("t5", "decoder.block", "decoder")]
)
def test_sites_know_their_list_of_layers(model: str, path: str, side: str) -> None:
    backbone, _ = MODELS[model]()
    found = index(backbone)
    inside = {site.layer_list for site in found if site.module_path.startswith(f"{path}.")}
    size = sum(parameter.numel() for parameter in backbone.get_submodule(path).parameters())
    assert inside == {LayerList(path, 2, size, side)}
    assert all(site.layer_list is None for site in found if site.layer is None)
