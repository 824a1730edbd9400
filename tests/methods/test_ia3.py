"""(IA)^3 against its formula and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.injection.attach import attach
from deltatune.injection.merge import merge
from deltatune.methods import IA3
from deltatune.methods.addition.ia3 import ScaledInput, ScaledOutput, ScaledWeight
from tests.conformance.cells import fresh, shake
from tests.methods.oracle import compare_with_peft
from tests.models import output


@pytest.mark.parametrize(
    ("model", "outputs", "inputs"),
    [
        ("bert", ["attention.self.key", "attention.self.value"], ["layer.0.output.dense", "layer.1.output.dense"]),
        ("llama", ["k_proj", "v_proj"], ["down_proj"]),
        ("t5", ["k", "v"], ["wo"]),
        ("opt", ["k_proj", "v_proj"], ["fc2"]),
        ("bloom", [], ["dense_4h_to_h"]),
    ],
)
def test_equals_peft(model: str, outputs: list[str], inputs: list[str]) -> None:
    backbone, batch = fresh(model)
    config = IA3Config(target_modules=outputs + inputs, feedforward_modules=inputs, init_ia3_weights=True)
    where = None if outputs else ["feed_forward.down"]
    delta = compare_with_peft(
        backbone,
        batch,
        IA3(),
        where,
        config,
        lambda name: f"{name.removesuffix('.l')}.ia3_l.default",
        lambda _, tensor: tensor.flatten(),
    )
    kinds = {type(entry.patch) for entry in delta.entries if entry.site.leaf == "down"}
    assert kinds == {ScaledInput}
    assert {type(entry.patch) for entry in delta.entries if entry.site.leaf != "down"} <= {ScaledOutput}


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    delta = attach(backbone, IA3(), ["0", "2"])
    backbone.double()
    shake(delta, spread=0.7)
    l_0, l_2 = delta.parameters()
    hidden = torch.tanh(l_0 * (x @ backbone[0].weight.T + backbone[0].bias))
    expected = l_2 * (hidden @ backbone[2].weight.T + backbone[2].bias)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_the_hidden_layer_is_scaled_at_the_input_of_the_second_matrix() -> None:
    backbone, inputs = fresh("llama")
    down = backbone.get_submodule("model.layers.0.mlp.down_proj")
    delta = attach(backbone, IA3(), "feed_forward.down", layers=0)
    shake(delta, spread=0.5)
    (scale,) = delta.parameters()
    x = torch.randn(3, 48)
    expected = (scale * x) @ down.weight.clone().T
    torch.testing.assert_close(down(x), expected, atol=1e-6, rtol=1e-5)
    merge(delta)
    torch.testing.assert_close(down(x), expected, atol=1e-5, rtol=1e-5)
    output(backbone, inputs)


def test_keys_and_values_of_a_fused_projection() -> None:
    backbone, _ = fresh("gpt2")
    c_attn = backbone.get_submodule("transformer.h.0.attn.c_attn")
    x = torch.randn(3, 32)
    query, key, value = c_attn(x).split(32, -1)
    delta = attach(backbone, IA3(), "attention.{key,value}", layers=0)
    shake(delta, spread=0.5)
    scales = {entry.site.leaf: entry.patch.l for entry in delta.entries}
    expected = torch.cat([query, scales["key"] * key, scales["value"] * value], -1)
    torch.testing.assert_close(c_attn(x), expected)
    merge(delta)
    torch.testing.assert_close(c_attn(x), expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_read_without_calling_a_module() -> None:
    """Keys and values of ``nn.MultiheadAttention``, weight and bias; and experts, each with an l of its own."""
    attention = nn.MultiheadAttention(6, 2, batch_first=True).double()
    backbone = nn.ModuleDict({"attention": attention})
    with torch.no_grad():
        attention.in_proj_bias.normal_()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    by_hand, plain = copy.deepcopy(attention), attention(x, x, x)[0]
    delta = attach(backbone, IA3(), "attention.in_proj_weight")
    backbone.double()
    assert torch.equal(attention(x, x, x)[0], plain)
    shake(delta, spread=0.5)
    (scale,) = delta.parameters()
    with torch.no_grad():
        by_hand.in_proj_weight.mul_(scale[:, None])
        by_hand.in_proj_bias.mul_(scale)
    expected = by_hand(x, x, x)[0]
    torch.testing.assert_close(attention(x, x, x)[0], expected, atol=1e-10, rtol=1e-10)
    attention(x, x, x)[0].square().sum().backward()
    assert scale.grad is not None and scale.grad.abs().min() > 0
    merge(delta)
    torch.testing.assert_close(attention(x, x, x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("model", "where"), [("torch_encoder", None), ("mixtral", "experts.down"), ("qwen3_moe", "*.gate_up_proj")])
def test_it_is_saved_from_there_and_follows_its_vector(model: str, where: str | None, tmp_path: Path) -> None:
    backbone, inputs = fresh(model)
    delta = attach(backbone, IA3(), where, head=False)
    shake(delta, spread=0.5)
    with torch.no_grad():
        found = output(backbone, inputs)  # kept from here on
        for entry in delta.entries:
            if isinstance(entry.patch, ScaledWeight):
                theta, scale = entry.patch.view.read(entry.site.part(entry.parameter)), entry.patch.l
                expected = theta * (scale[..., None, :] if entry.site.leaf == "down" else scale[..., None])
                assert torch.equal(entry.patch.view.read(entry.patch(entry.site.part(entry.parameter))), expected)
        save(delta, tmp_path / "delta")
        other, _ = fresh(model)
        load(other, tmp_path / "delta")
        assert torch.equal(output(other, inputs), found)
        shake(delta, spread=0.5, seed=8)
        moved = output(backbone, inputs)
        assert not torch.allclose(moved, found)
        merge(delta)
        torch.testing.assert_close(output(backbone, inputs), moved, atol=1e-5, rtol=1e-5)


def test_a_table_of_embeddings_merges() -> None:
    backbone = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    delta = attach(backbone, IA3(), "0")
    shake(delta, spread=0.5)
    ids = torch.arange(7)
    expected = backbone(ids)
    merge(delta)
    torch.testing.assert_close(backbone(ids), expected)


def test_ones_change_no_bit() -> None:
    backbone, inputs = fresh("bert")
    with torch.no_grad():
        plain: Tensor = output(backbone, inputs)
        delta = attach(backbone, IA3())
        assert all(
            torch.equal(parameter, torch.ones_like(parameter)) for name, parameter in delta.named_parameters() if name.endswith(".l")
        )
        assert torch.equal(output(backbone, inputs), plain)
