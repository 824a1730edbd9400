"""``untrained``: a delta of random tensors, and nothing learnt; the baseline that shows how much of a score chance is."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from deltatune.injection.delta import Delta
from deltatune.study.procedures.procedure import procedures
from deltatune.study.trial import Outcome, Trial
from deltatune.training.borrowed import trainer_modules
from deltatune.training.job import make_job
from deltatune.training.run import load_data
from deltatune.training.train import Course, conclude, sampled

STD = 0.02
"""Of the draw, as transformers begins its weights."""


@procedures.register("untrained")
def untrained(trial: Trial, folder: Path) -> Outcome:
    """Attach, draw, score on the test rows."""
    began, run = time.perf_counter(), trial.run
    data = sampled(load_data(run.task, run.settings), run.settings)
    with trainer_modules():
        job = make_job(run.backbone, data, run.methods, run.where, run.layers, run.settings, None)
        for delta in job.deltas:
            randomise(delta, run.settings.seed)
        numbers = conclude(job, run, None, Course(), "none").to_json()
    numbers.pop("out")
    return Outcome(trial.key, numbers, seconds=round(time.perf_counter() - began, 3))


@torch.no_grad()
def randomise(delta: Delta, seed: int) -> None:
    """phi_i ~ N(0, 0.02^2) for the tensors that a fresh delta has at zero, so that it acts; what is drawn already stays."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in delta.parameters():
        if not parameter.any():
            parameter.copy_(STD * torch.randn(parameter.shape, generator=generator).to(parameter))
