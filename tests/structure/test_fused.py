"""The rows of fused projections, checked against what the models compute with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from deltatune.structure.index import index
from deltatune.structure.site import Site
from deltatune.structure.where import find_sites
from tests.models import MODELS, tokens

ROLES = ("query", "key", "value")
TINY: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
TINY |= {"bos_token_id": 1, "eos_token_id": 2}


def falcon(**layout: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.FalconConfig(**TINY, ffn_hidden_size=64, alibi=False, bias=True, **layout)
    return transformers.FalconForCausalLM(config).eval()


def bigcode(multi_query: bool) -> nn.Module:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPTBigCodeConfig(**size, n_inner=48, multi_query=multi_query)
    return transformers.GPTBigCodeForCausalLM(config).eval()


def persimmon() -> nn.Module:
    torch.manual_seed(0)
    return transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**TINY, intermediate_size=48)).eval()


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda build=MODELS[name]: build()[0]) for name in ("gpt2", "modernbert", "phi3", "gpt_neox", "bloom")},
    "falcon-7b": lambda: falcon(new_decoder_architecture=False, multi_query=True),
    "falcon-40b": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": lambda: falcon(new_decoder_architecture=False, multi_query=False),
    "starcoder": lambda: bigcode(multi_query=True),
    "bigcode": lambda: bigcode(multi_query=False),
    "persimmon": persimmon,
}
"""Contiguous, grouped, interleaved per head and per group; with and without an architecture file."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """What the attentions compute with: (q, k, v) of each attention, as the model splits them."""
    calls: list[tuple[Tensor, ...]] = []
    attend = nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((query.clone(), key.clone(), value.clone()))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    return calls


def splits(model: nn.Module, site: Site, calls: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The (q, k, v) of the first layer."""
    calls.clear()
    captured: list[tuple[Tensor, ...]] = []
    attention = model.get_submodule(site.path.rpartition(".")[0])
    if hasattr(attention, "_reshape"):  # BLOOM computes its attention by hand
        split = attention._reshape
        attention._reshape = lambda fused: captured.append(split(fused)) or captured[-1]
    with torch.no_grad():
        model(**tokens())
    if captured:
        del attention._reshape
    return captured[0] if captured else calls[0]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_changing_the_rows_of_one_role_changes_only_that_role(name: str, seen: list[tuple[Tensor, ...]]) -> None:
    model = ATTENTIONS[name]()
    sites = {role: find_sites(model, f"attention.{role}", layers=0)[0] for role in ROLES}
    assert len({site.path for site in sites.values()}) == 1
    plain = splits(model, sites["query"], seen)
    for k, role in enumerate(ROLES):
        site = sites[role]
        weight = site.weight
        with torch.no_grad():
            kept = weight.clone()
            noise = torch.randn(site.part(weight).shape, generator=torch.Generator().manual_seed(k))
            axis = site.rows_axis(weight)
            rows = torch.arange(weight.shape[axis])[site.rows]
            weight.index_add_(axis, rows, noise)
            changed = splits(model, site, seen)
            weight.copy_(kept)
        for j in range(3):
            assert torch.equal(changed[j], plain[j]) == (j != k), (role, ROLES[j])
        assert not torch.isclose(changed[k], plain[k]).all(-1).any(), f"some head of {role} did not change"


def inputs_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What ``module`` is given in one forward."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: caught.append(args[0].clone()))
    with torch.no_grad():
        run()
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "starcoder", "bigcode"])
def test_value_and_key_rows_of_attentions_without_rotation(name: str) -> None:
    """softmax(q (K + 1 c)') = softmax(q K'), and P (V + 1 c') = P V + 1 c': a key offset is invisible, a value offset passes through."""
    model = ATTENTIONS[name]()
    output = find_sites(model, "attention.output", layers=0)[0].module
    plain = inputs_of(output, lambda: model(**tokens()))
    for role in ROLES:
        site = find_sites(model, f"attention.{role}", layers=0)[0]
        offset = torch.randn(site.out_features, generator=torch.Generator().manual_seed(3))
        bias = site.module.bias
        with torch.no_grad():
            kept = bias.clone()
            bias[site.rows] += offset
            moved = inputs_of(output, lambda: model(**tokens())) - plain
            bias.copy_(kept)
        if role == "key":
            assert moved.abs().max() < 1e-5
        elif role == "value":
            expected = offset.repeat(plain.shape[-1] // len(offset))
            torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-5, rtol=0)
        else:
            assert moved.abs().max() > 1e-4


def test_multihead_attention_reads_query_key_and_value_from_its_own_parameter() -> None:
    """The same two identities on ``nn.MultiheadAttention``, whose output projection is never called."""
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = {site.leaf: site for site in index(attention) if site.parameter}
    with torch.no_grad():
        plain = attention(x, x, x, need_weights=False)[0]
        offset = torch.randn(32)
        attention.in_proj_bias[found["key"].rows] += offset
        torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], plain)
        attention.in_proj_bias[found["value"].rows] += offset
        moved = attention(x, x, x, need_weights=False)[0] - plain
    torch.testing.assert_close(moved, (found["output"].weight @ offset).expand_as(moved))
    assert found["output"].parameter == "out_proj.weight"
    assert found["output"].module is attention


def test_multihead_attention_with_other_widths_for_keys() -> None:
    attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=24)
    shapes = {site.leaf: (site.path, site.out_features, site.in_features) for site in index(attention) if site.role and site.parameter}
    assert shapes == {
        "query": ("q_proj_weight", 32, 32),
        "key": ("k_proj_weight", 32, 16),
        "value": ("v_proj_weight", 32, 24),
        "output": ("out_proj.weight", 32, 32),
    }


@pytest.mark.parametrize("name", ["modernbert", "phi3"])
def test_gate_and_up_of_a_fused_feed_forward(name: str) -> None:
    """W2 (f(g) * u) is linear in u, and not in g."""
    model, _ = MODELS[name]()
    gate, up = (find_sites(model, f"feed_forward.{leaf}", layers=0)[0] for leaf in ("gate", "up"))
    module = model.get_submodule(up.path.rpartition(".")[0])
    assert_linear_in_up(module, (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),), gate, up)


def test_gate_and_up_of_a_gated_t5() -> None:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
    model = transformers.T5Model(transformers.T5Config(**size, feed_forward_proj="gated-gelu")).eval()
    gate, up = (find_sites(model, f"encoder.feed_forward.{leaf}")[0] for leaf in ("gate", "up"))
    module = model.get_submodule(up.path.rpartition(".")[0])
    assert_linear_in_up(module, (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),), gate, up)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_gate_and_up_of_fused_experts(name: str) -> None:
    model, _ = MODELS[name]()
    gate, up = (find_sites(model, f"experts.{leaf}", layers=0)[0] for leaf in ("gate", "up"))
    assert (up.parameter, up.module) == ("gate_up_proj", gate.module)
    assert up.key.endswith("mlp.experts.gate_up_proj:up")
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    assert_linear_in_up(up.module, (x, chosen, torch.full((6, 2), 0.5)), gate, up)


def assert_linear_in_up(module: nn.Module, args: tuple[Tensor, ...], gate: Site, up: Site) -> None:
    with torch.no_grad():
        plain = module(*args)
        doubled = {}
        for site in (gate, up):
            kept = site.weight.clone()
            site.weight[..., slice(None) if site.rows is None else site.rows, :] *= 2
            doubled[site.leaf] = module(*args)
            site.weight.copy_(kept)
    torch.testing.assert_close(doubled["up"], 2 * plain)
    assert not torch.allclose(doubled["gate"], 2 * plain, atol=1e-3)


def test_experts_that_alternate_gate_and_up_and_store_their_weights_transposed() -> None:
    """GPT-OSS: (expert, in, out) with gate and up in turn, as its own forward slices them."""
    config = transformers.GptOssConfig(**TINY, num_key_value_heads=2, head_dim=8, intermediate_size=24, num_local_experts=4)
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    gate, up, down = (find_sites(model, f"experts.{leaf}", layers=0)[0] for leaf in ("gate", "up", "down"))
    assert isinstance(gate.rows, Tensor)
    assert isinstance(up.rows, Tensor)
    assert gate.rows.tolist() == list(range(0, 48, 2))
    assert up.rows.tolist() == list(range(1, 48, 2))
    assert (up.in_features, up.out_features) == (32, 24)
    assert (down.in_features, down.out_features) == (24, 32)
    assert up.transposed
    assert up.rows.device.type == "cpu"


@pytest.mark.parametrize("name", ["codegen", "deberta"])
def test_a_layout_nobody_knows_gets_no_roles(name: str) -> None:
    """CodeGen and DeBERTa lay their fused rows out in ways of their own: better no role than a wrong one."""
    config = transformers.CONFIG_MAPPING[name](n_layer=1) if name == "codegen" else transformers.CONFIG_MAPPING[name](num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    roles = {site.role for site in index(model)}
    assert {"attention", "attention.output"} <= roles
    assert not {"attention.query", "attention.key", "attention.value"} & roles
