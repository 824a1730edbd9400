"""One method on one backbone with one batch of random tokens, taken apart: forward, backward, optimiser, inference, and their memory."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.backbones import load_backbone
from deltatune.errors import Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.compose import Composition
from deltatune.study.trial import Trial
from deltatune.training.borrowed import trainer_modules
from deltatune.training.job import kind_of
from deltatune.training.life import Life
from deltatune.training.live import live_tensors
from deltatune.training.measure import most_memory, peak_memory

PARTS = ("forward", "backward", "optimiser")
INFERENCE = "inference"
LABELS, ANSWER = 2, 8
"""Outputs of an encoder's head; tokens of an encoder-decoder's answer."""

SHARE = 0.9
"""Of the free memory that a measurement may take: beyond it, it fails and the machine does not."""

CLASSES = {
    "encoder": "AutoModelForSequenceClassification",
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}

Batch = Mapping[str, Any]


@dataclass
class Stepper:
    """What takes steps.

    Attributes:
        model: with whatever is attached.
        parameters: all that train.
        optimizer: over them.
        life: of the deltas; None where the backbone itself trains.
    """

    model: nn.Module
    parameters: int
    optimizer: torch.optim.Optimizer
    life: Life | None = None

    def step(self, batch: Batch) -> dict[str, float]:
        """Seconds of each part of one step."""
        self.model.train()
        if self.life is not None:
            self.life.before_step()
        clock = Clock()
        loss = self.model(**batch).loss
        seconds = {"forward": clock.lap()}
        loss.backward()
        if self.life is not None:
            self.life.add_penalty()
        seconds["backward"] = clock.lap()
        self.optimizer.step()
        if self.life is not None:
            self.life.after_step()
        self.optimizer.zero_grad()
        return {**seconds, "optimiser": clock.lap()}


class Clock:
    """Seconds since the last lap, behind which no GPU works on."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def lap(self) -> float:
        """Since the last one."""
        began, self._began = self._began, self._now()
        return self._began - began


@torch.no_grad()
def infer(model: nn.Module, batch: Batch) -> float:
    """Seconds of one forward without gradients."""
    model.eval()
    clock = Clock()
    model(**batch)
    return clock.lap()


def load(trial: Trial) -> nn.Module:
    """The trial's backbone with the head of its kind."""
    kind = kind_of(trial.backbone)
    torch.manual_seed(trial.seed)
    model = load_backbone(trial.backbone, auto_class=CLASSES[kind], num_labels=LABELS if kind == "encoder" else None, new_head=True)
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def batch_of(model: nn.Module, trial: Trial, rows: int | None = None) -> dict[str, Any]:
    """Random tokens without padding: ``batch_size`` rows of ``max_length``, or of what is left where a prompt comes before them."""
    settings, config = trial.run.settings, model.config
    rows, place = rows or settings.batch_size, next(model.parameters()).device
    most = min(int(config.vocab_size), 30_000)  # type: ignore[union-attr, arg-type]
    draw = torch.Generator().manual_seed(trial.seed)
    ids = torch.randint(min(1000, most // 2), most, (rows, settings.max_length), generator=draw).to(place)
    kind = kind_of(trial.backbone)
    labels = torch.arange(rows, device=place) % LABELS if kind == "encoder" else ids if kind == "decoder" else ids[:, :ANSWER]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain(model: nn.Module, lr: float) -> Stepper:
    """Full fine-tuning as everybody does it: the backbone's own parameters train."""
    parameters = list(model.requires_grad_().parameters())
    return Stepper(model, sum(one.numel() for one in parameters), torch.optim.AdamW(parameters, lr=lr))


def attached(model: nn.Module, trial: Trial, batch: Batch) -> Stepper:
    """The trial's deltas."""
    saved = attach(model, list(trial.run.methods), trial.run.where, layers=trial.run.layers)
    deltas = saved.deltas if isinstance(saved, Composition) else [saved]
    life = Life(deltas, 1000)
    life.begin([batch])
    groups = [group for delta in deltas for group in delta.parameter_groups(rate(trial))]
    return Stepper(model, sum(delta.budget().delta for delta in deltas), torch.optim.AdamW(groups), life)


def rate(trial: Trial) -> float:
    """So small that the steps change nothing that is measured."""
    return trial.run.settings.lr or 1e-6


def twin(model: nn.Module) -> nn.Module:
    """A second model on the same numbers: its parameters are its own, their storage is shared."""
    shared: dict[int, Any] = {id(one): nn.Parameter(one.data, one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, shared)


def memory(trial: Trial) -> dict[str, Any]:
    """Bytes of live tensors at their peak, and of the process beyond its libraries, in training steps.

    Raises:
        Unsupported: a step would take longer than the trial's option ``most_seconds`` leaves for it.
    """
    with trainer_modules():
        limit_memory()
        torch.zeros(1, device=torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None)
        with peak_memory():
            before = most_memory()
        model = load(trial)
        expected = expect(model, trial)
        total = sum(one.numel() for one in model.parameters())
        batch = batch_of(model, trial)
        own = plain(model, rate(trial)) if trial.options.get("plain") else attached(model, trial, batch)
        own.step(batch)  # the optimiser makes its moments
        with peak_memory() as peak:
            own.step(batch)
        with live_tensors() as live:
            own.step(batch)
    found = {"live_bytes": live.peak, "peak_memory_bytes": peak.bytes - before, "expected_seconds": round(expected, 3)}
    return {**found, "trainable_parameters": own.parameters, "total_parameters": total}


def expect(model: nn.Module, trial: Trial) -> float:
    """Seconds that a full step will take, from one forward of one row.

    Raises:
        Unsupported: three steps would take longer than ``most_seconds``.
    """
    most, row = float(trial.options.get("most_seconds", math.inf)), batch_of(model, trial, rows=1)
    infer(model, row)
    seconds = 3 * infer(model, row) * trial.run.settings.batch_size
    if 3 * seconds > most:
        raise Unsupported(
            f"A step of {trial.said} would take about {seconds:.0f} seconds here; `most_seconds` leaves {most:g} for three. "
            "Do it on a faster machine: `deltatune study resume NAME --again` tries what failed."
        )
    return seconds


def times(trial: Trial, rounds: int) -> list[dict[str, list[float]]]:
    """Seconds of each part: ``rounds`` rounds in which the trial's method and full fine-tuning take turns; the first of a pair is ours.

    What has a final form (a prefix without its MLP, a sparse difference) infers in that form.
    """
    with trainer_modules():
        limit_memory()
        model = load(trial)
        batch = batch_of(model, trial)
        full = plain(twin(model), rate(trial))
        own = full if trial.options.get("plain") else attached(model, trial, batch)
        pair = (own, full)
        for one in pair:
            one.step(batch)
        found = [_both(lambda one: one.step(batch), pair) for _ in range(rounds)]
        if own.life is not None:
            own.life.finish()
        for one in pair:
            one.optimizer.zero_grad()
            infer(one.model, batch)
        inferred = [_both(lambda one: {INFERENCE: infer(one.model, batch)}, pair) for _ in range(rounds)]
    return [{**steps, **calls} for steps, calls in zip(found, inferred, strict=True)]


def _both(measure: Callable[[Stepper], Mapping[str, float]], pair: tuple[Stepper, Stepper]) -> dict[str, list[float]]:
    ours, full = (measure(one) for one in pair)
    return {part: [round(ours[part], 6), round(full[part], 6)] for part in ours}


def limit_memory() -> None:
    """Leave the machine a tenth of what is free: an allocation beyond that fails here, and ends nothing else. Linux only."""
    file = Path("/proc/meminfo")
    if torch.accelerator.is_available() or not file.exists():
        return
    import resource

    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (int(SHARE * free), resource.RLIM_INFINITY))
