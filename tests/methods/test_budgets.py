"""Parameter counts of the survey's table, on the true architectures (on the meta device: no memory, no weights)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from deltatune.injection.attach import attach
from deltatune.methods import Adapter, BitFit, LoRA, Method, PartialBitFit, PrefixTuning, PromptTuning
from deltatune.methods.kinds import SelectionPatch
from deltatune.structure.where import find_sites

BERT_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
ROBERTA_LARGE = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **BERT_LARGE)
T5_BASE = dict(vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12)


def _meta(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(config)
    return model


def bert_base() -> nn.Module:
    return _meta(transformers.BertModel, transformers.BertConfig())


def bert_large() -> nn.Module:
    return _meta(transformers.BertModel, transformers.BertConfig(**BERT_LARGE))  # type: ignore[arg-type]


def roberta_large() -> nn.Module:
    return _meta(transformers.RobertaForMaskedLM, transformers.RobertaConfig(**ROBERTA_LARGE))  # type: ignore[arg-type]


def t5_base() -> nn.Module:
    return _meta(transformers.T5ForConditionalGeneration, transformers.T5Config(**T5_BASE))  # type: ignore[arg-type]


CASES = [
    (roberta_large, Adapter(bottleneck_dim=64), None, 6_343_680, 0.0175),
    (t5_base, LoRA(rank=8), "attention.{query,value}", 884_736, 0.00397),
    (t5_base, LoRA(rank=8), None, 884_736, 0.00397),
    (t5_base, Adapter(bottleneck_dim=24), None, 2_259_360, 0.0101),
    (bert_base, PrefixTuning(num_virtual_tokens=10, reparameterization=False), None, 12 * 2 * 10 * 768, 0.00168),
]


@pytest.mark.parametrize(("build", "method", "where", "count", "share"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_counts_of_the_survey(build: Any, method: Method, where: str | None, count: int, share: float) -> None:
    budget = attach(build(), method, where, head=False).budget()
    assert budget.delta == count
    assert budget.N + count == budget.M
    assert budget.ratio == pytest.approx(share, rel=0.03)  # papers count N in several ways
    assert budget.size_bytes == 4 * count
    assert f"{count:,} of" in str(budget)


SELECTED = [
    (bert_base, BitFit(), 102_912, 0.00094),
    (bert_large, BitFit(), 272_384, 0.00081),
    (roberta_large, BitFit(), 323_673, 0.0009),
    (bert_base, PartialBitFit(), 46_080, 0.00042),
]


@pytest.mark.parametrize(("build", "method", "count", "share"), SELECTED, ids=lambda value: getattr(value, "__name__", None))
def test_counts_of_biases(build: Any, method: Method, count: int, share: float) -> None:
    """What trains in place keeps its originals, so it needs memory; the sites and the patches are counted instead."""
    backbone = build()
    chosen: dict[int, nn.Parameter] = {}
    for site in find_sites(backbone, list(method.where)):
        for patch in method.build(site, None):
            assert isinstance(patch, SelectionPatch)
            parameter = site.module.get_parameter(patch.parameter)
            chosen[id(parameter)] = parameter
    total = sum(parameter.numel() for parameter in backbone.parameters())
    assert sum(parameter.numel() for parameter in chosen.values()) == count
    assert count / total == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(("width", "tokens", "count"), [(1024, 10, 10_240), (768, 100, 76_800), (4096, 100, 409_600)])
def test_counts_of_prompts(width: int, tokens: int, count: int) -> None:
    """A prompt is as wide as the embeddings, however deep the model is."""
    config = transformers.T5Config(vocab_size=16, d_model=width, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    delta = attach(transformers.T5ForConditionalGeneration(config), PromptTuning(num_virtual_tokens=tokens))
    assert delta.budget().delta == count
