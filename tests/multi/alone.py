"""What jobs that train together are compared with: each trained by itself with ``dt.train`` on the same model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import deltatune as dt
from deltatune.multi.together.job import Job, Outcome
from deltatune.multi.together.together import train_together
from deltatune.tasks import TaskData
from deltatune.training.result import Result
from tests.training import tiny

COMMON: dict[str, Any] = {"batch_size": 4, "max_steps": 50, "evaluations": 0, "lr": 1e-3}


def still(name: str) -> Any:
    """A tiny model that drops nothing."""
    model: Any = tiny.backbone(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for field, value in vars(model.config).items():
        if "drop" in field and isinstance(value, float):
            setattr(model.config, field, 0.0)
    for module in model.modules():
        for field, value in vars(module).items():
            if "drop" in field and isinstance(value, float):
                setattr(module, field, 0.0)
    return model


def data() -> TaskData:
    """The tiny task with one metric: to resample f1 for its interval takes longer than 50 steps."""
    whole = tiny.data()
    return dataclasses.replace(whole, task=dataclasses.replace(whole.task, metrics=("accuracy",)))


def job(method: Any, **settings: Any) -> Job:
    return Job(data(), method, **(COMMON | settings))


def alone(model: nn.Module, one: Job, **options: Any) -> Result:
    return dt.train(
        copy.deepcopy(model), one.task, one.methods, where=one.where, layers=one.layers, tokenizer=tiny.tokenizer(), progress="none",
        **options, **one.settings.to_dict(),
    )  # fmt: skip


def together(model: nn.Module, jobs: Sequence[Job], **options: Any) -> list[Outcome]:
    """Everything in one forward, however small, unless ``tokens`` says otherwise."""
    return train_together(jobs, model, tokenizer=tiny.tokenizer(), **({"tokens": 100_000, "progress": "none"} | options))


def result(outcome: Outcome) -> Result:
    assert outcome.error is None, outcome.error
    assert outcome.apart is None, outcome.apart
    assert outcome.result is not None
    return outcome.result


def far(one: Result, other: Result, without: frozenset[str] = frozenset()) -> float:
    """Largest difference of any weight, and of any loss."""
    unseen = WITHOUT | without
    found = [abs(a["loss"] - b["loss"]) for a, b in zip(one.history, other.history, strict=True) if "loss" in a]
    for mine, theirs in zip(one.deltas, other.deltas, strict=True):
        own, others = mine.state_dict(), theirs.state_dict()
        assert own.keys() == others.keys()
        found += [float((own[name].float() - others[name].float()).abs().max()) for name in own if own[name].numel() and name not in unseen]
    return max(found, default=0.0)


WITHOUT = frozenset(f"bert.encoder.layer.{layer}.attention.self.key.bias" for layer in range(4))
"""Biases that a softmax does not see: their gradients are nothing but rounding, of which AdamW makes steps."""


def moved(one: Result, start: dict[str, torch.Tensor]) -> float:
    """Largest change since the start."""
    state = {name: tensor for delta in one.deltas for name, tensor in delta.state_dict().items()}
    return max(float((state[name] - tensor).abs().max()) for name, tensor in start.items())
