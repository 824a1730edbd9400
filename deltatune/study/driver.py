"""The driver of a study: takes what waits from the store, has it carried out, and alone writes what became of it."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from deltatune.study.design import Keep
from deltatune.study.progress import Progress
from deltatune.study.runner.runner import Begun, Happening, Runner, Unit
from deltatune.study.shows import Show
from deltatune.study.store.store import Store
from deltatune.study.store.writer import Writer
from deltatune.study.trial import Failure, Outcome, Trial

TOGETHER = 16
"""Most trials of a unit."""


@dataclass
class Driver:
    """Runs one study to its end.

    Attributes:
        store: where it is.
        name: of the study.
        folder: where its trials lie while they run.
        runner: makes who carries trials out, from the folder and the time limit.
        show: who hears of it.
        fuse: train trials of one backbone together, where that is faster.
        again: begin with what failed before, too.
    """

    store: Store
    name: str
    folder: Path
    runner: Callable[[Path, float | None], Runner]
    show: Show
    fuse: bool = False
    again: bool = False

    def run(self) -> Progress:
        """Everything that waits; what was running when another driver died goes first.

        Raises:
            UnknownName: the store has no such study.
            Busy: another driver is at it.
        """
        with self.store.writer(self.name) as writer:
            return _Course(self, writer).run()


class _Course:
    """One run of a driver."""

    def __init__(self, driver: Driver, writer: Writer) -> None:
        self.show, self.folder, self.writer = driver.show, driver.folder, writer
        study = driver.store.study(driver.name)
        self.keep: Keep = study.keep
        self.retries = study.retries
        first = set(writer.recover())
        if driver.again:
            writer.again()
        trials = sorted(writer.waiting(), key=lambda trial: trial.key not in first)
        counts = driver.store.counts(driver.name)
        self.runner = driver.runner(self.folder, study.time_limit)
        self.attempts = {record.key: record.attempts for record in driver.store.records(driver.name)}
        self.allowed = {key: count + 1 + self.retries for key, count in self.attempts.items()}
        self.progress = Progress(driver.name, sum(counts.values()), counts["done"], counts["failed"], self.runner.at_once)
        self.progress.waiting = {trial.key: trial for trial in trials}
        self.progress.learn(driver.store.records(driver.name))
        self.queue = deque(units(trials) if driver.fuse else [(trial,) for trial in trials])
        self._sweep({trial.key for trial in trials})

    def _sweep(self, waiting: set[str]) -> None:
        """Folders of trials that were stored ahead of a kill."""
        if self.keep == "nothing" and self.folder.is_dir():
            for place in self.folder.iterdir():
                if place.is_dir() and place.name not in waiting:
                    shutil.rmtree(place, ignore_errors=True)

    def run(self) -> Progress:
        self.show.began(self.progress)
        try:
            for happening in self.runner.conduct(self.queue):
                self._take(happening)
        except KeyboardInterrupt:
            self.writer.drop(list(self.progress.running))
            raise
        finally:
            self.show.close(self.progress)
        return self.progress

    def _take(self, happening: Happening) -> None:
        if isinstance(happening, Begun):
            for trial in happening.unit:
                self.progress.waiting.pop(trial.key, None)
                self.attempts[trial.key] = self.writer.start(trial.key, happening.place)
                self.progress.running[trial.key] = (trial, time.monotonic())
                self.show.started(trial, self.progress)
            return
        trial, _ = self.progress.running.pop(happening.key)
        if isinstance(happening, Outcome):
            self._done(trial, happening)
        else:
            self._failed(trial, happening)

    def _done(self, trial: Trial, outcome: Outcome) -> None:
        self.writer.finish(outcome)
        if self.keep == "nothing":
            shutil.rmtree(self.folder / trial.key, ignore_errors=True)
        self.progress.done += 1
        self.progress.pace.learn(trial.procedure, trial.backbone, trial.label, outcome.seconds)
        self.show.done(trial, outcome, self.progress)

    def _failed(self, trial: Trial, failure: Failure) -> None:
        again = not failure.lasting and self.attempts[trial.key] < self.allowed[trial.key]
        self.writer.fail(failure, again=again)
        if again:
            self.progress.waiting[trial.key] = trial
            self.queue.append((trial,))
        else:
            self.progress.failed += 1
        self.show.failed(trial, failure, again, self.progress)


def units(trials: Sequence[Trial]) -> list[Unit]:
    """Trials that may share forwards in units of at most ``TOGETHER``: trainings of one backbone that stand beside each other."""
    found: list[Unit] = []
    ordered = sorted(trials, key=lambda trial: trial.procedure == "train")  # the others are quick, and first
    for (procedure, _), group in groupby(ordered, key=lambda trial: (trial.procedure, trial.backbone)):
        members = list(group)
        size = TOGETHER if procedure == "train" else 1
        found += [tuple(members[start : start + size]) for start in range(0, len(members), size)]
    return found
