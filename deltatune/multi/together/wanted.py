"""What is wanted of each job, looked at before anything is trained: its rows, its folder, and with whom it can share a forward."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from deltatune.errors import DeltaError
from deltatune.multi.together.job import Job, Outcome
from deltatune.tasks import TaskData
from deltatune.training.job import check_module, choose_framing, kind_of
from deltatune.training.place import METRICS, RunFolder
from deltatune.training.run import Run, load_data, read_run
from deltatune.training.train import run_of, sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Wanted:
    """A job before it is trained.

    Attributes:
        outcome: to be filled in.
        data: the rows it sees.
        run: what its ``run.yaml`` says.
        place: its folder; None where nothing is kept.
        company: jobs with the same can share a forward.
    """

    outcome: Outcome
    data: TaskData
    run: Run
    place: RunFolder | None
    company: Hashable

    @property
    def job(self) -> Job:
        """The job."""
        return self.outcome.job

    @property
    def name(self) -> str:
        """Of the job."""
        return self.outcome.name


def wanted(
    job: Job, name: str, backbone: str | nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None, *, overwrite: bool
) -> Wanted:
    """Look at one job.

    Raises:
        DeltaError: what ``dt.train`` would refuse ahead of training, with the job's name.
    """
    try:
        data = load_data(job.task, job.settings)
        run = run_of(backbone, job.task, data, job.methods, job.settings, job.where, job.layers)
        outcome = Outcome(job, name, apart=_obstacle(job))
        outcome.numbers = {} if folder is None or overwrite else _finished(folder, run)
        place = None if folder is None or outcome.numbers else RunFolder(folder, run, overwrite=overwrite)
        framing = choose_framing(data.task, kind_of(backbone), job.settings, tokenizer)
        if isinstance(backbone, nn.Module):
            check_module(backbone, framing, job.settings)
    except DeltaError as error:
        raise type(error)(f"Job `{name}`: {error}") from error
    return Wanted(outcome, sampled(data, job.settings), run, place, (framing.auto_class, job.settings.bf16))


def _obstacle(job: Job) -> str | None:
    """A setting that shares no forward."""
    if job.settings.gradient_checkpointing:
        return "`gradient_checkpointing` computes parts of a forward anew, and each job's random numbers with them"
    if job.settings.recompute:
        return "`recompute` decides for a whole forward what it keeps"
    if job.settings.streaming:
        return "`streaming` reads rows while it trains, and the jobs of a company look ahead"
    if job.settings.keep_frozen is not None:
        return f"`keep_frozen={job.settings.keep_frozen}` lets a forward begin at layers of its own"
    if job.settings.quantize is not None:
        return f"`quantize={job.settings.quantize}` makes a backbone of its own"
    if job.settings.report_to:
        return f"`report_to` asks for {', '.join(job.settings.report_to)}, which watches one run at a time"
    return None


def _finished(folder: Path, run: Run) -> dict[str, object]:
    """The numbers of this very run where the folder holds it finished."""
    try:
        numbers: dict[str, object] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return {} if run.differences(read_run(folder)) else numbers
    except (OSError, ValueError, DeltaError):
        return {}
