"""Settings -> transformers' ``TrainingArguments``: steps, intervals, device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from deltatune.training.settings import Settings


@dataclass(frozen=True)
class Schedule:
    """When a run steps, looks and saves.

    Attributes:
        total: optimiser steps.
        evaluate: steps between two evaluations; 0 for none.
        save: steps between two checkpoints; 0 for none.
        log: steps between two points of the learning curve.
    """

    total: int
    evaluate: int
    save: int
    log: int

    @classmethod
    def of(cls, settings: Settings, rows: int, *, processes: int = 1, resumable: bool = True) -> Schedule:
        """The schedule for so many training rows; only a run that can be resumed saves at regular steps."""
        batches = math.ceil(rows / (settings.batch_size * processes))
        steps = math.ceil(batches / settings.grad_accumulation)
        total = settings.max_steps or max(1, math.ceil(settings.epochs * steps))
        evaluate = math.ceil(total / settings.evaluations) if settings.evaluations else 0
        save = settings.save_steps or evaluate or math.ceil(total / 5)
        return cls(total, evaluate, save if resumable else 0, _divisor(save, most=max(1, total // 100)))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``: a checkpoint then falls on a point of the curve."""
    return max(step for step in range(1, min(number, most) + 1) if number % step == 0)


def training_arguments(settings: Settings, schedule: Schedule, folder: Path, lr: float) -> TrainingArguments:
    """The Trainer's arguments of a run that keeps its checkpoints in ``folder``."""
    on_cpu = not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.grad_accumulation,
        max_steps=schedule.total,
        optim="adamw_torch",  # torch's fused optimisers write parameters behind their version counters, on which caches rely
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * schedule.total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=on_cpu,
        eval_strategy="steps" if schedule.evaluate else "no",
        eval_steps=schedule.evaluate or None,
        save_strategy="steps" if schedule.save else "no",
        save_steps=schedule.save or schedule.total,
        logging_strategy="steps",
        logging_steps=schedule.log,
        logging_nan_inf_filter=False,
        report_to=list(settings.report_to) or "none",
        seed=settings.seed,
        accelerator_config={"dispatch_batches": False},  # streamed batches differ in length, which one process could not deal out
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:  # DataParallel would copy the backbone at each step and lose the slots' hooks
        arguments._n_gpu = 1
    return arguments
