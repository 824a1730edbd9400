"""The ``where`` language, and the errors of entries that hit nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from deltatune.errors import InvalidValue, NoSite
from deltatune.structure.index import Index
from deltatune.structure.where import Where, expand, find_sites, spoken
from tests.models import MODELS


@pytest.fixture(scope="module")
def backbones() -> dict[str, Index]:
    return {
        name: Index(MODELS[name]()[0]) for name in ("bert", "gpt2", "t5", "llama", "mlp", "torch_encoder", "mixtral", "vit", "tied_mlp")
    }


def keys(index: Index, where: Where | None, layers: Any = None) -> list[str]:
    return [site.key for site in find_sites(index.backbone, where, layers, index)]


@pytest.mark.parametrize(
    ("name", "where", "count"),
    [
        ("bert", "attention.query", 2),
        ("bert", "attention.{query,value}", 4),
        ("bert", "attention.*", 8),
        ("bert", "{attention,feed_forward}.{output,up}?", 4),
        ("bert", "*.query", 2),
        ("bert", "query", 2),
        ("bert", "self.query", 2),
        ("bert", "output", 4),
        ("bert", "output.dense", 4),
        ("bert", "bert.encoder.layer.0.output.dense", 1),
        ("bert", "layer.*.output.dense", 4),
        ("bert", "layer.[01].output.dense", 2),
        ("bert", "bert.encoder.layer.*.intermediate.dense", 2),
        ("bert", r"re:.*\.layer\.1\..*dense", 3),
        ("bert", ["attention.query", "attention.quer*"], 2),
        ("bert", ["attention.*", "!attention.key"], 6),
        ("bert", ["attention.*", "!re:.*layer.0.*"], 4),
        ("bert", ["attention.*", "!attention"], 2),
        ("bert", ["*.dense", "!bert.encoder"], 1),
        ("bert", "readout", 1),
        ("bert", "word_embeddings", 1),
        ("gpt2", "c_attn", 2),
        ("gpt2", "c_attn:query", 2),
        ("gpt2", "*c_attn*", 2),
        ("gpt2", "*.c_attn:*", 6),
        ("gpt2", "re:.*c_attn.*", 2),
        ("gpt2", "attention.{query,key,value}", 6),
        ("gpt2", ["attention.*", "!c_attn"], 2),
        ("mlp", "0", 1),
        ("mlp", "2.0", 1),
        ("mlp", "*.0", 1),
        ("mlp", ["0", "2.0", "3"], 3),
        ("mlp", "*", 3),
        ("mlp", "2", 1),
        ("torch_encoder", "attention.query", 2),
        ("torch_encoder", "attention.*", 8),
        ("torch_encoder", "out_proj.weight", 2),
        ("torch_encoder", "self_attn.in_proj_weight", 2),
        ("mixtral", "experts.*", 6),
        ("mixtral", "experts.gate_up_proj", 2),
        ("mixtral", "experts.{gate,down}", 4),
        ("mixtral", "mlp.gate", 2),
        ("vit", "embeddings.cls_token", 1),
        ("t5", "attention.*", 24),
        ("t5", ["attention.*", "!cross_attention.*"], 16),
        ("t5", ["attention.*", "!decoder.*"], 8),
        ("t5", "encoder", 1),
        ("t5", "encoder.*", 23),
        ("t5", "norm", 12),
        ("t5", "decoder.norm", 7),
        ("t5", "shared", 1),
    ],
)
def test_counts(backbones: dict[str, Index], name: str, where: Where, count: int) -> None:
    found = keys(backbones[name], where)
    assert len(found) == count
    assert len(set(found)) == count


def test_sites_come_in_module_order_whatever_the_order_of_the_entries(backbones: dict[str, Index]) -> None:
    found = keys(backbones["bert"], ["feed_forward.up", "attention.query"])
    order = [site.key for site in backbones["bert"]]
    assert found == sorted(found, key=order.index)


def test_functions_of_a_site(backbones: dict[str, Index]) -> None:
    assert len(keys(backbones["gpt2"], lambda site: type(site.module).__name__ == "Conv1D")) == 8
    assert len(keys(backbones["gpt2"], lambda site: site.role == "attention.query")) == 2
    assert len(keys(backbones["bert"], [lambda site: isinstance(site.module, nn.Linear), "!readout"])) == 13
    assert len(keys(backbones["t5"], lambda site: site.tied)) == 4


def test_left_out_it_lists_what_has_a_role_or_parameters(backbones: dict[str, Index]) -> None:
    found = keys(backbones["bert"], None)
    assert "bert.pooler.dense" in found
    assert "bert.encoder.layer.0" in found
    assert "bert.encoder.layer.0.output" not in found
    assert "dropout" not in found


def test_a_star_is_every_module_with_parameters_whole_and_without_containers(backbones: dict[str, Index]) -> None:
    found = keys(backbones["gpt2"], "*")
    assert "transformer.h" not in found
    assert "transformer.h.0.attn.c_attn" in found
    assert not any(":" in key for key in found)
    reached = {id(parameter) for key in found for parameter in backbones["gpt2"][key].module._parameters.values()}
    assert reached >= {id(parameter) for parameter in backbones["gpt2"].backbone.parameters()}


def test_exclusions_alone_start_from_everything(backbones: dict[str, Index]) -> None:
    assert keys(backbones["mlp"], "!2") == ["0", "3"]


def test_counts_of_each_entry(backbones: dict[str, Index]) -> None:
    matches = find_sites(
        backbones["t5"].backbone, ["attention.{query,value}", "!decoder.attention.query", "readout?"], index=backbones["t5"]
    )
    assert matches.counts == {"attention.query": 6, "attention.value": 6, "readout?": 0, "!decoder.attention.query": 2}
    assert len(matches) == 10
    assert matches[0].role == "encoder.attention.query"


def test_matches_print_as_a_listing(backbones: dict[str, Index]) -> None:
    text = repr(find_sites(backbones["gpt2"].backbone, "attention.{key,output}", layers=1, index=backbones["gpt2"]))
    assert text.splitlines() == [
        "attention.key     transformer.h.1.attn.c_attn:key  32x96, 32 rows",
        "attention.output  transformer.h.1.attn.c_proj      32x32",
        "2 sites: `attention.key` 1, `attention.output` 1",
    ]


@pytest.mark.parametrize(
    ("layers", "count"),
    [(0, 3), (1, 3), ("1", 3), (range(2), 6), ([0, 1], 6), ({1}, 3), ("top:1", 3), ("bottom:1", 3), ("top:2", 6), (range(1, 2), 3)],
)
def test_layers(backbones: dict[str, Index], layers: Any, count: int) -> None:
    assert len(keys(backbones["t5"], "attention.query", layers)) == count


def test_layers_count_from_the_end_of_each_stack() -> None:
    model = nn.Transformer(16, 2, num_encoder_layers=3, num_decoder_layers=1, dim_feedforward=16, batch_first=True)
    found = [site.path for site in find_sites(model, "feed_forward.up", layers="top:1")]
    assert found == ["encoder.layers.2.linear1", "decoder.layers.0.linear1"]


def test_layers_leave_out_what_lies_outside_the_layers(backbones: dict[str, Index]) -> None:
    assert keys(backbones["llama"], "norm", "top:1") == [
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    ]
    assert {site.layer for site in find_sites(backbones["llama"].backbone, layers=1, index=backbones["llama"])} == {1}


@pytest.mark.parametrize(
    ("name", "where", "layers", "message"),
    [
        (
            "t5",
            "attention.qurey",
            None,
            "No site of T5ForConditionalGeneration matches `attention.qurey`. Did you mean `attention.query` or `attention.key` or "
            "`attention.value`? 24 sites have role `attention.*`; list them with dt.find_sites(backbone).",
        ),
        (
            "bert",
            "attention.{query,valeu}",
            None,
            "No site of BertForSequenceClassification matches `attention.valeu`. Did you mean `attention.value` or "
            "`attention.key` or `attention.self`? "
            "8 sites have role `attention.*`; list them with dt.find_sites(backbone).",
        ),
        (
            "bert",
            "cross_attention.query",
            None,
            "No site of BertForSequenceClassification matches `cross_attention.query`. Did you mean `attention.query` or "
            "`attention.key` or `attention.value`? "
            "List the sites with dt.find_sites(backbone).",
        ),
        (
            "llama",
            "q_porj",
            None,
            "No site of LlamaForCausalLM matches `q_porj`. Did you mean `q_proj` or `v_proj` or `o_proj`? "
            "List the sites with dt.find_sites(backbone).",
        ),
        (
            "mlp",
            "attention.query",
            None,
            "No site of Sequential matches `attention.query`. It has no roles; its paths are `0`, `2.0`, `3`. "
            "List the sites with dt.find_sites(backbone).",
        ),
        (
            "bert",
            "re:nothing",
            None,
            "No site of BertForSequenceClassification matches `re:nothing`. List the sites with dt.find_sites(backbone).",
        ),
        (
            "bert",
            ["attention.query", "!lm_head"],
            None,
            "No site of BertForSequenceClassification matches `!lm_head`. It has the roles `attention`, `attention.key`,",
        ),
        (
            "bert",
            ["attention.query", "!readout"],
            None,
            "`!readout` excludes nothing: it hits 1 site, such as `classifier`, but none that the other entries chose. "
            "Leave it out, or correct it.",
        ),
        (
            "bert",
            ["attention.query", "!attention.*"],
            None,
            "`where=['attention.query', '!attention.*']` leaves no site of BertForSequenceClassification.",
        ),
        (
            "bert",
            "attention.query",
            7,
            "`layers=7` was asked for, but BertForSequenceClassification has layers 0 to 1. "
            'Layers count from 0; `layers="top:1"` is the last one.',
        ),
        ("bert", "attention.query", "top:3", "`layers='top:3'` was asked for, but BertForSequenceClassification has layers 0 to 1."),
        ("bert", "attention.query", [0, -1], "`layers=[0, -1]` was asked for, but BertForSequenceClassification has layers 0 to 1."),
        ("bert", "readout", 0, "`readout` hits 1 site outside the layers, none with `layers=0`. Change one of the two."),
        ("bert", "bert.encoder.layer.1.output.dense", 0, "hits 1 site in layers 1 to 1, none with `layers=0`."),
        ("mlp", "0", 0, "`layers=0` was asked for, but Sequential has no layers. Leave `layers` out."),
        ("bert", lambda site: False, None, "No site of BertForSequenceClassification matches `<lambda>`."),
        ("bert", "cross_attention?", None, "`where='cross_attention?'` leaves no site of BertForSequenceClassification."),
    ],
)
def test_what_hits_nothing_is_an_error(backbones: dict[str, Index], name: str, where: Where, layers: Any, message: str) -> None:
    with pytest.raises(NoSite, match=re.escape(message)):
        keys(backbones[name], where, layers)


@pytest.mark.parametrize(
    ("where", "layers", "message"),
    [
        ("re:(", None, "`re:(` is no regular expression"),
        ("attention.{query", None, "`attention.{query` has a brace without its partner. Write alternatives as `attention.{query,value}`."),
        ("attention.query}", None, "has a brace without its partner"),
        ([], None, "`where` is empty."),
        ("!", None, "`where` has the entry `!`, which names nothing."),
        ([3], None, "`where` has the entry 3, a int."),
        ("attention.query", "last", '`layers="last"` cannot be read. Write a range, a list, a number, "top:3" or "bottom:2".'),
        ("attention.query", "top:0", "cannot be read"),
        ("attention.query", [], "`layers=[]` cannot be read"),
        ("attention.query", [True], "cannot be read"),
        ("attention.query", ["a"], "cannot be read"),
        ("attention.query", 1.5, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(backbones: dict[str, Index], where: Any, layers: Any, message: str) -> None:
    with pytest.raises(InvalidValue, match=re.escape(message)):
        keys(backbones["bert"], where, layers)


@pytest.mark.parametrize("pattern", ["{a,b}" * 40, "{" + "a," * 2000 + "}" + "{b,c}" * 12, "{{a,b},{a,b}}" * 12, "x" * 10**6 + "{a,b}"])
def test_few_braces_do_not_stand_for_gigabytes(pattern: str) -> None:
    with pytest.raises(InvalidValue, match="stands for more than"):
        expand(pattern)


def test_braces_are_written_out() -> None:
    assert expand("a.{b,c}.{d,e}") == ["a.b.d", "a.b.e", "a.c.d", "a.c.e"]
    assert expand("a.{b,{c,d}}") == ["a.b", "a.c", "a.b", "a.d"]
    assert expand("plain") == ["plain"]


def test_how_a_role_can_be_asked_for() -> None:
    assert spoken("attention.query") == ["attention.query"]
    assert spoken("encoder.attention") == ["encoder.attention", "attention"]
    assert spoken("decoder.cross_attention.key") == ["decoder.cross_attention.key", "cross_attention.key", "attention.key"]
