"""Generation with a route: cached decoding, beams and several sequences a row, on decoders and encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, LoRA, PrefixTuning, PromptTuning
from tests.conformance.cells import fresh, shake
from tests.multi.rows import batch, row, use

ENTRIES = ["low", None, "prompt", "prefix", ["low", "scaled"], "bottle"]


def attached(model: str) -> nn.Module:
    backbone, _ = fresh(model)
    methods = {
        "low": LoRA(rank=3),
        "scaled": IA3(),
        "bottle": Adapter(bottleneck_dim=4),
        "prompt": PromptTuning(3, init="random"),
        "prefix": PrefixTuning(2, reparameterization=False, init_std=0.5),
    }
    for seed, (name, method) in enumerate(methods.items()):
        shake(dt.attach(backbone, method, name=name), spread=0.2, seed=seed)
    dt.switch(backbone, None)
    return backbone


@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}], ids=["greedy", "beams"]
)
@torch.no_grad()
def test_rows_generate_what_they_generate_alone(model: str, options: dict[str, Any]) -> None:
    backbone: Any = attached(model)
    inputs = batch(len(ENTRIES), length=5, padding=False)
    options = {**options, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    expected = []
    for i, entry in enumerate(ENTRIES):
        use(backbone, entry)
        expected.append(backbone.generate(**row(inputs, i), **options))
    dt.switch(backbone, None)
    plain = backbone.generate(**inputs, **options)
    with dt.route(backbone, ENTRIES):
        found = backbone.generate(**inputs, **options)
    assert torch.equal(found, torch.cat(expected))
    assert not torch.equal(found, plain)
