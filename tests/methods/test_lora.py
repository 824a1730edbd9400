"""LoRA against its formula and against PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach, detach
from deltatune.injection.merge import merge
from deltatune.methods import LoRA
from deltatune.methods.reparameterization.lora import LoRALinear, LoRAWeight
from tests.conformance.cells import fresh, shake
from tests.methods.oracle import compare_with_peft
from tests.models import output


def _peft_name(name: str) -> str:
    path, _, factor = name.rpartition(".")
    return f"{path}.{factor}.default.weight"


@pytest.mark.parametrize("stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("bert", ["query", "value"]),
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("t5", ["q", "v", "wi"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("vit", ["q_proj", "v_proj"]),
    ],
)
def test_linear_maps_equal_peft(model: str, targets: list[str], stabilized: bool) -> None:
    backbone, inputs = fresh(model)
    targets = [name for name in targets if any(path.endswith(f".{name}") for path, _ in backbone.named_modules())] or ["query", "value"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=stabilized, init_lora_weights=False)
    if model == "gpt2":
        config.fan_in_fan_out = True
    where = [f"re:.*\\.{name}" for name in targets]
    delta = compare_with_peft(backbone, inputs, LoRA(rank=3, alpha=5, rank_stabilized=stabilized), where, config, _peft_name)
    assert all(type(patch) is LoRALinear for patch in delta.patches)


def test_embeddings_equal_peft() -> None:
    backbone, inputs = fresh("bert")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["word_embeddings", "query"], init_lora_weights=False)

    def name_of(name: str) -> str:
        path, _, factor = name.rpartition(".")
        return f"{path}.lora_embedding_{factor[-1]}.default" if "embeddings" in path else _peft_name(name)

    compare_with_peft(backbone, inputs, LoRA(rank=3, alpha=6), ["word_embeddings", "attention.query"], config, name_of)


def test_convolutions_equal_peft() -> None:
    backbone, inputs = fresh("conv_net")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["conv1", "conv2"], init_lora_weights=False)
    delta = compare_with_peft(
        backbone,
        inputs,
        LoRA(rank=2, alpha=4),
        ["conv1", "conv2"],
        config,
        lambda name: _peft_name(name.replace(".weight.", ".")),
        lambda _, tensor: tensor.reshape(tensor.shape[0], -1),  # A (r, in, k, k) and B (out, r, 1, 1)
    )
    assert all(type(patch) is LoRAWeight for patch in delta.patches)


def test_fused_experts_equal_peft() -> None:
    backbone, inputs = fresh("mixtral")
    experts, rank = 4, 2
    config = LoraConfig(
        r=rank,
        lora_alpha=4,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )

    def name_of(name: str) -> str:
        path, _, factor = name.rpartition(".")
        owner, _, parameter = path.rpartition(".")
        inner = ".base_layer" if parameter == "gate_up_proj" else ""  # PEFT wraps the experts once for each parameter
        return f"{owner}{inner}.{factor}.default.weight"

    def shape(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("lora_A"):
            return tensor.reshape(experts, rank, -1)
        return tensor.reshape(tensor.shape[0], rank, experts).permute(2, 0, 1)

    where = ["*.experts.gate_up_proj", "*.experts.down_proj"]
    delta = compare_with_peft(backbone, inputs, LoRA(rank=rank, alpha=4), where, config, name_of, shape)
    assert all(type(patch) is LoRAWeight for patch in delta.patches)


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_formula_in_double_precision(stabilized: bool) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, LoRA(rank=3, alpha=2.5, rank_stabilized=stabilized), "0")
    backbone.double()
    shake(delta, spread=1.0)
    A, B = delta.parameters()
    s = 2.5 / (math.sqrt(3) if stabilized else 3)
    W, b = backbone[0].weight, backbone[0].bias
    expected = x @ (W + s * B @ A).T + b
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    merge(delta)
    torch.testing.assert_close(backbone[0].weight, W.detach(), atol=0, rtol=0)
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


def test_rows_of_a_fused_projection() -> None:
    """W of GPT-2's ``c_attn`` is (in, 3 d): the query is its first d columns, the value its last."""
    backbone, inputs = fresh("gpt2")
    c_attn = backbone.get_submodule("transformer.h.0.attn.c_attn")
    delta = attach(backbone, LoRA(rank=2, alpha=2), "attention.{query,value}", layers=0)
    shake(delta, spread=0.3)
    parts = {entry.site.leaf: entry.patch for entry in delta.entries}
    x = torch.randn(3, 32)
    with torch.no_grad():
        W = c_attn.weight.clone()
        for leaf, start in (("query", 0), ("value", 64)):
            W[:, start : start + 32] += (parts[leaf].lora_B @ parts[leaf].lora_A).T
        torch.testing.assert_close(c_attn(x), x @ W + c_attn.bias, atol=1e-5, rtol=1e-5)
        output(backbone, inputs)


def test_a_start_is_kaiming_uniform_and_zero() -> None:
    torch.manual_seed(0)
    for backbone in (nn.Sequential(nn.Linear(400, 300)), nn.Sequential(nn.Conv2d(16, 300, 5))):
        A, B = attach(backbone, LoRA(rank=50), "0").parameters()
        bound = 1 / math.sqrt(400)  # gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in)
        assert not B.any()
        A = A.detach()
        assert A.abs().max() <= bound
        assert math.isclose(float(A.std()), bound / math.sqrt(3), rel_tol=0.02)


def test_dropout_is_on_the_input_and_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(8, 64)
    delta = attach(backbone, LoRA(rank=4, dropout=0.5), "0")
    shake(delta, spread=1.0)
    A, B = delta.parameters()
    W, b = backbone[0].weight, backbone[0].bias
    torch.manual_seed(1)
    found = backbone(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, x @ W.T + b + 4 * (kept @ A.T) @ B.T, atol=1e-4, rtol=1e-5)
    backbone.eval()
    torch.testing.assert_close(backbone(x), x @ W.T + b + 4 * (x @ A.T) @ B.T, atol=1e-4, rtol=1e-5)


def test_a_tied_weight_changes_for_all_its_owners() -> None:
    backbone, inputs = fresh("tied_mlp")
    delta = attach(backbone, LoRA(rank=2), "first")
    shake(delta, spread=0.3)
    (patch,) = delta.patches
    assert type(patch) is LoRAWeight
    with torch.no_grad():
        found = output(backbone, inputs)
        W = patch(backbone.get_parameter("first.weight"))
        detach(delta)
        backbone.get_parameter("first.weight").copy_(W)
        torch.testing.assert_close(found, output(backbone, inputs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rank=0), r"LoRA\(rank=0\) was asked for; `rank` must be greater than 0"),
        (dict(rank=-1), "`rank` must be greater than 0"),
        (dict(alpha=0.0), "`alpha` must be greater than 0"),
        (dict(dropout=1.0), r"LoRA\(dropout=1\.0\) was asked for; `dropout` must be at least 0 and less than 1"),
        (dict(dropout=-0.1), "`dropout` must be at least 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        LoRA(**fields)  # type: ignore[arg-type]
