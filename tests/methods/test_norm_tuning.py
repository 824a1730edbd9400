"""Norm tuning: which vectors train, by the formula and beside PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deltatune.errors import NoSite
from deltatune.injection.attach import attach
from deltatune.methods import NormTuning
from tests.conformance.cells import fresh, shake
from tests.methods.oracle import compare_with_peft
from tests.models import HIDDEN, LAYERS, output

NORMS = {"bert": "LayerNorm", "gpt2": "ln_", "llama": "norm", "t5": "layer_norm", "bart": "layer_norm", "vit": "norm", "qwen3": "norm"}


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.RMSNorm(5)).double()
    delta = attach(backbone, NormTuning(), ["1", "2"])
    shake(delta, spread=0.7)
    tensors = dict(delta.named_parameters())
    assert sorted(tensors) == ["1.bias", "1.weight", "2.weight"]
    x = torch.randn(3, 6, dtype=torch.float64)
    h = backbone[0](x)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * tensors["1.weight"] + tensors["1.bias"]
    h = h / (h.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * tensors["2.weight"]
    torch.testing.assert_close(backbone(x), h, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("model", NORMS)
def test_it_trains_every_norm_and_nothing_else(model: str) -> None:
    backbone, inputs = fresh(model)
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, NormTuning(), head=False)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in backbone.named_parameters() if parameter.ndim == 1 and "norm" in name.lower()} | {
        name for name in dict(backbone.named_parameters()) if NORMS[model] in name
    }
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
    if model == "bert":
        assert delta.budget().delta == (2 * LAYERS + 1) * 2 * HIDDEN


PEFT: dict[str, list[str]] = {
    "bert": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "model.norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "t5": ["layer_norm", "final_layer_norm"],
}


@pytest.mark.parametrize("model", PEFT)
def test_peft_computes_the_same(model: str) -> None:
    from peft import LNTuningConfig

    backbone, inputs = fresh(model)

    def names(name: str) -> str:
        path, _, kind = name.rpartition(".")
        return f"{path}.ln_tuning_layers.default.{kind}"

    config: Any = LNTuningConfig(target_modules=PEFT[model])
    delta = compare_with_peft(backbone, inputs, NormTuning(), None, config, names)
    assert len(delta.entries) == len(dict(delta.named_parameters()))


def test_a_matrix_is_no_norm() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(NoSite, match=r"NormTuning\(\) has nothing to do in BertForSequenceClassification where `attention\.query` hits"):
        attach(backbone, NormTuning(), "attention.query")
