"""``train``: one ``dt.train``, which goes on where a kill stopped it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from deltatune.study.procedures.procedure import procedures
from deltatune.study.trial import Outcome, Trial
from deltatune.training.place import METRICS
from deltatune.training.train import train as dt_train

RUN = "run"


@procedures.register("train")
def train(trial: Trial, folder: Path) -> Outcome:
    """Train in ``folder/run``; a run that is finished there already is read, not done again."""
    began, place, run = time.perf_counter(), folder / RUN, trial.run
    if not (place / METRICS).exists():
        settings = run.settings.to_dict()
        dt_train(run.backbone, run.task, run.methods, where=run.where, layers=run.layers, out=place, progress="none", **settings)
    return finished(trial, place, time.perf_counter() - began)


def finished(trial: Trial, place: Path, seconds: float, together: int = 1) -> Outcome:
    """The outcome of a run that is finished, from its files.

    Args:
        trial: whose run it is.
        place: the run's folder.
        seconds: the trial took; its share of what was done together.
        together: trials that shared its forwards.
    """
    numbers = json.loads((place / METRICS).read_text(encoding="utf-8"))
    history = tuple(numbers.pop("history", ()))
    numbers.pop("out", None)
    if together > 1:
        numbers |= {"seconds": seconds, "together": together}
    return Outcome(trial.key, numbers, history, round(seconds, 3))
