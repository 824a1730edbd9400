"""The driver of a study: takes what waits from the store, has it carried out, and alone writes what became of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from deltatune.study.progress import Progress
from deltatune.study.runner.runner import Begun, Happening, Runner, Unit
from deltatune.study.search import Search, searches_of, with_rate
from deltatune.study.shows import Show
from deltatune.study.store.store import Store
from deltatune.study.store.writer import Writer
from deltatune.study.trial import Failure, Outcome, Trial
from deltatune.training.files import discard

TOGETHER = 16
"""Most trials of a unit."""

SEARCH = "search"


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
    """One run of a driver: searches for learning rates first, where there are any, then the trials."""

    def __init__(self, driver: Driver, writer: Writer) -> None:
        self.show, self.folder, self.writer, self.fuse = driver.show, driver.folder, writer, driver.fuse
        self.study = driver.store.study(driver.name)
        first = set(writer.recover())
        if driver.again:
            writer.again()
        self.waiting = sorted(writer.waiting(), key=lambda trial: trial.key not in first)
        records = driver.store.records(driver.name)
        self.attempts = {record.key: record.attempts for record in records}
        self.before = dict(self.attempts)
        self.searches = searches_of(self.study)
        for trial, history in driver.store.searched(driver.name) if self.searches else ():
            self._search_of(trial).take(trial, history)
        self.runner = driver.runner(self.folder, self.study.time_limit)
        self.progress = self._progress(driver.store.counts(driver.name))
        self.progress.learn(records)
        self.queue: deque[Unit] = deque()

    def _progress(self, counts: dict[str, int]) -> Progress:
        budget = sum(search.rates.trials * len(search.tasks) for search in self.searches.values())
        known = sum(len(found) for search in self.searches.values() for found in search.values.values())
        known += sum(trial.purpose == SEARCH for trial in self.waiting)
        total = sum(counts.values()) + max(budget - known, 0)
        progress = Progress(self.study.name, total, counts["done"], counts["failed"], self.runner.at_once)
        progress.waiting = {trial.key: trial for trial in self.waiting}
        return progress

    def _sweep(self) -> None:
        """Folders of trials that were stored ahead of a kill."""
        waiting = {trial.key for trial in self.waiting}
        if self.study.keep == "nothing" and self.folder.is_dir():
            for place in self.folder.iterdir():
                if place.is_dir() and place.name not in waiting:
                    discard(place)

    def run(self) -> Progress:
        self._sweep()
        self.show.began(self.progress)
        try:
            self._conduct([trial for trial in self.waiting if trial.purpose == SEARCH], list(self.searches.values()))
            self._conduct([self._rated(trial) for trial in self.waiting if trial.purpose != SEARCH], [])
        except KeyboardInterrupt:
            self.writer.drop(list(self.progress.running))
            raise
        finally:
            self.runner.close()
            self.show.close(self.progress)
        return self.progress

    def _conduct(self, trials: Sequence[Trial], searches: Sequence[Search]) -> None:
        self.queue.extend(units(trials) if self.fuse else [(trial,) for trial in trials])
        for search in searches:
            self._propose(search)
        for happening in self.runner.conduct(self.queue):
            self._take(happening)

    def _search_of(self, trial: Trial) -> Search:
        return self.searches[trial.backbone, trial.label]

    def _propose(self, search: Search) -> None:
        """Enter the search's next trials, if it has any."""
        if any(trial.purpose == SEARCH and self._search_of(trial) is search for trial in self.progress.waiting.values()):
            return
        for trial in search.next():
            self.writer.enter(trial)
            self.progress.waiting[trial.key] = trial
            self.queue.append((trial,))

    def _rated(self, trial: Trial) -> Trial:
        search = self.searches.get((trial.backbone, trial.label))
        return trial if search is None else with_rate(trial, search.best)

    def _take(self, happening: Happening) -> None:
        if isinstance(happening, Begun):
            for trial in happening.unit:
                self.progress.waiting.pop(trial.key, None)
                self.attempts[trial.key] = self.writer.start(trial)
                self.progress.running[trial.key] = (trial, time.monotonic())
                self.show.started(trial, self.progress)
            return
        trial, _ = self.progress.running.pop(happening.key)
        over = self._done(trial, happening) if isinstance(happening, Outcome) else self._failed(trial, happening)
        if over and trial.purpose == SEARCH:
            self._search_of(trial).take(trial, happening.history if isinstance(happening, Outcome) else None)
            self._propose(self._search_of(trial))

    def _done(self, trial: Trial, outcome: Outcome) -> bool:
        self.writer.finish(outcome)
        if self.study.keep == "nothing" or trial.purpose == SEARCH:
            discard(self.folder / trial.key)
        self.progress.done += 1
        self.progress.pace.learn(trial.procedure, trial.backbone, trial.label, outcome.seconds)
        self.show.done(trial, outcome, self.progress)
        return True

    def _failed(self, trial: Trial, failure: Failure) -> bool:
        """Whether that was the last attempt."""
        again = not failure.lasting and self.attempts[trial.key] - self.before.get(trial.key, 0) <= self.study.retries
        self.writer.fail(failure, again=again)
        if again:
            self.progress.waiting[trial.key] = trial
            self.queue.append((trial,))
        else:
            self.progress.failed += 1
        self.show.failed(trial, failure, again, self.progress)
        return not again


def units(trials: Sequence[Trial]) -> list[Unit]:
    """Trials that may share forwards in units of at most ``TOGETHER``: trainings of one backbone that stand beside each other."""
    found: list[Unit] = []
    ordered = sorted(trials, key=lambda trial: trial.procedure == "train")  # the others are quick, and first
    for (procedure, _), group in groupby(ordered, key=lambda trial: (trial.procedure, trial.backbone)):
        members = list(group)
        size = TOGETHER if procedure == "train" else 1
        found += [tuple(members[start : start + size]) for start in range(0, len(members), size)]
    return found
