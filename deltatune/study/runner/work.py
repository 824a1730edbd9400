"""The work itself, wherever it is done: trials become outcomes or failures, and nothing that goes wrong goes further."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from deltatune.checkpoint.folder import locked
from deltatune.errors import DeltaError, Halt
from deltatune.multi.together.job import Job
from deltatune.multi.together.together import train_together
from deltatune.study.procedures import procedures
from deltatune.study.procedures.train import RUN, finished
from deltatune.study.trial import Failure, Outcome, Trial


class TimeLimit(Halt):
    """A trial took longer than its study allows."""


def carry_out(unit: Sequence[Trial], folder: Path, limit: float | None = None) -> Iterator[Outcome | Failure]:
    """Carry out the trials of a unit.

    Args:
        unit: one trial, or several of one backbone that are trained together.
        folder: of the study; each trial has one below it.
        limit: most seconds of one trial; a unit of several may take as many times that.
    """
    if len(unit) > 1:
        yield from _together(unit, folder, limit)
        return
    [trial] = unit
    place = folder / trial.key

    def work() -> Outcome:
        with alone(place):
            return procedures[trial.procedure](trial, place)

    yield guarded(trial, work, limit)


def guarded(trial: Trial, work: Callable[[], Outcome], limit: float | None) -> Outcome | Failure:
    """What ``work`` gives, or why it gave nothing. Only the end of the process goes further."""
    began = time.perf_counter()
    try:
        with limited(limit):
            return work()
    except Exception as cause:
        return failure_of(trial, cause, time.perf_counter() - began)


def failure_of(trial: Trial, cause: BaseException, seconds: float) -> Failure:
    """An error as the store keeps it; ours come again when the same is tried again."""
    told = "".join(traceback.format_exception(cause))
    lasting = isinstance(cause, DeltaError | TimeLimit)
    return Failure(trial.key, type(cause).__name__, str(cause), told, lasting, round(seconds, 3))


def _together(unit: Sequence[Trial], folder: Path, limit: float | None) -> Iterator[Outcome | Failure]:
    """In shared forwards; if the unit as a whole fails, each by itself."""
    jobs, began = [_job(trial, folder) for trial in unit], time.perf_counter()
    try:
        with limited(None if limit is None else limit * len(unit)):
            outcomes = train_together(jobs, unit[0].backbone, progress="none")
    except Exception:  # whose fault it is turns out where each is trained alone
        for trial in unit:
            yield from carry_out([trial], folder, limit)
        return
    seconds = round((time.perf_counter() - began) / len(unit), 3)  # each its share
    for trial, outcome in zip(unit, outcomes, strict=True):
        if outcome.error is not None:
            yield failure_of(trial, outcome.error, seconds)
        else:
            yield finished(trial, folder / trial.key / RUN, seconds, together=len(unit))


def _job(trial: Trial, folder: Path) -> Job:
    run = trial.run
    settings = run.settings.to_dict()
    return Job(run.task, run.methods, name=trial.key, where=run.where, layers=run.layers, out=folder / trial.key / RUN, **settings)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder: a worker may outlive its driver for a moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise ``TimeLimit`` in the block after so many seconds; only in a main thread, and not on Windows."""
    if seconds is None or os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimit(f"The trial took longer than the {seconds:g} seconds that its study allows (`time_limit`).")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
