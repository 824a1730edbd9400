"""T5-base at its true size, without memory: the counts of the reference (delta-tuning, appendix B)."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltatune.structure.index import Index, index
from deltatune.structure.where import find_sites


@pytest.fixture(scope="module")
def t5_base() -> Index:
    config = transformers.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    return index(model)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("attention", 36),
        ("encoder.attention", 12),
        ("decoder.attention", 12),
        ("cross_attention", 12),
        ("decoder.cross_attention", 12),
        ("attention.{query,value}", 72),
        ("attention.*", 144),
        ("cross_attention.*", 48),
        ("encoder.attention.*", 48),
        ("decoder.attention.*", 48),
        ("decoder.*attention.query", 24),
        ("*.query", 36),
        ("feed_forward.up", 24),
        (["attention.output", "feed_forward.down"], 60),
        ("layer", 24),
        ("embedding", 2),
        ("stack", 2),
        ("lm_head", 1),
        ("norm", 62),
    ],
)
def test_counts(t5_base: Index, where: str | list[str], count: int) -> None:
    assert len(find_sites(t5_base.backbone, where, index=t5_base)) == count


def test_lora_of_rank_8_has_884736_parameters(t5_base: Index) -> None:
    sites = find_sites(t5_base.backbone, "attention.{query,value}", index=t5_base)
    assert sum(8 * (site.in_features + site.out_features) for site in sites) == 884_736


def test_houlsby_adapters_of_width_24_have_2259360_parameters(t5_base: Index) -> None:
    sites = find_sites(t5_base.backbone, ["attention.output", "feed_forward.down"], index=t5_base)
    assert sum(2 * 24 * site.out_features + 24 + site.out_features for site in sites) == 2_259_360
