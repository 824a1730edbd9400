"""Settings do what they say in a run: warm-up of the rate, forwards in bfloat16, weights of classes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltatune.methods import LoRA
from deltatune.tasks.framing import HeadFraming
from deltatune.training.train import train
from tests.training import tiny


def run(model: nn.Module, **settings: Any) -> Any:
    options = {"max_steps": 10, "batch_size": 8, "evaluations": 0, "lr": 1e-2, "progress": "none"} | settings
    return train(model, options.pop("data", None) or tiny.data(), LoRA(rank=2), tokenizer=tiny.tokenizer(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_warmup_is_the_share_of_steps_in_which_the_rate_rises(warmup: float) -> None:
    rates = [entry["learning_rate"] for entry in run(tiny.backbone("bert"), warmup=warmup).history]
    rising = round(10 * warmup)
    expected = [1e-2 * (step / rising if step < rising else (10 - step) / (10 - rising)) for step in range(10)]
    assert rates == pytest.approx(expected)


def test_weight_decay_shrinks_what_trains_and_is_off_unless_asked_for() -> None:
    """Of a parameter without a gradient (LoRA's A, as long as B is zero) a step leaves (1 - lr * decay)."""
    found = {}
    for decay in (0.0, 0.3):
        [delta] = run(tiny.backbone("bert"), weight_decay=decay, max_steps=1, warmup=0.0).deltas
        found[decay] = {name: tensor.clone() for name, tensor in delta.named_parameters() if name.endswith("lora_A")}
    plain = train(
        tiny.backbone("bert"), tiny.data(), LoRA(rank=2), tokenizer=tiny.tokenizer(), progress="none", lr=1e-30, max_steps=1, evaluations=0
    )
    for name, start in plain.deltas[0].named_parameters():
        if name.endswith("lora_A"):
            assert torch.equal(found[0.0][name], start)
            assert torch.allclose(found[0.3][name], start * (1 - 1e-2 * 0.3), rtol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_runs_the_forward_in_bfloat16_and_keeps_the_parameters(bf16: bool) -> None:
    model: Any = tiny.backbone("bert")
    seen: set[torch.dtype] = set()
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype) if torch.is_grad_enabled() else None
    )
    result = run(model, bf16=bf16, max_steps=2)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {parameter.dtype for parameter in result.deltas[0].parameters()} == {torch.float32}


def test_class_weights_weigh_the_loss() -> None:
    whole = tiny.data()
    rows = whole.train.select([index for index, label in enumerate(whole.train["label"]) if label == 0 or index < 12])
    data = dataclasses.replace(whole, train=rows)
    model = tiny.backbone("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    framing = HeadFraming(data.task, tiny.tokenizer(), 128)
    logits, labels = framing.score(copy.deepcopy(model), rows), torch.tensor(rows["label"])
    counts = torch.bincount(labels)
    assert counts.tolist() == [12, 4, 4]
    each = F.cross_entropy(logits, labels, reduction="none")
    by_hand = {True: (each * (len(rows) / (3 * counts))[labels]).mean(), False: each.mean()}
    for weighted, expected in by_hand.items():
        result = run(copy.deepcopy(model), data=data, class_weights=weighted, max_steps=1, batch_size=len(rows))
        assert result.history[0]["loss"] == pytest.approx(float(expected), abs=1e-3)
    assert abs(by_hand[True] - by_hand[False]) > 1e-2
