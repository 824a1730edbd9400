"""What a study shows while it runs: bars on a terminal, lines elsewhere, or events for programs."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from deltatune.study.progress import Progress
from deltatune.study.trial import Failure, Outcome, Trial
from deltatune.training.watch import clock

RUNNING = 6
"""Most running trials that are shown."""


class Show(ABC):
    """Hears what happens."""

    @abstractmethod
    def began(self, progress: Progress) -> None:
        """The study goes on, or begins."""

    @abstractmethod
    def started(self, trial: Trial, progress: Progress) -> None:
        """A trial was begun."""

    @abstractmethod
    def done(self, trial: Trial, outcome: Outcome, progress: Progress) -> None:
        """A trial is done."""

    @abstractmethod
    def failed(self, trial: Trial, failure: Failure, again: bool, progress: Progress) -> None:
        """An attempt failed."""

    @abstractmethod
    def close(self, progress: Progress) -> None:
        """It is over, or was stopped."""


def left(progress: Progress) -> str:
    """The time left in words."""
    seconds = progress.seconds_left
    return "time left not known yet" if seconds is None else f"about {clock(seconds)} left"


def result(outcome: Outcome) -> str:
    """A score with its metric, in a few words."""
    score, metric = outcome.numbers.get("score"), outcome.numbers.get("metric", "")
    said = "done" if score is None else f"{metric} {score:.4f}"
    return f"{said}{', the same answer to every row' if outcome.numbers.get('degenerate') else ''}, {outcome.seconds:.1f} s"


class Silent(Show):
    """Nothing."""

    def began(self, progress: Progress) -> None:
        """Nothing."""

    def started(self, trial: Trial, progress: Progress) -> None:
        """Nothing."""

    def done(self, trial: Trial, outcome: Outcome, progress: Progress) -> None:
        """Nothing."""

    def failed(self, trial: Trial, failure: Failure, again: bool, progress: Progress) -> None:
        """Nothing."""

    def close(self, progress: Progress) -> None:
        """Nothing."""


class Lines(Show):
    """A line a trial.

    Args:
        file: where to; standard error if left out.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file

    def _say(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def began(self, progress: Progress) -> None:
        """How far it is."""
        self._say(f"{progress.name}: {progress.done} of {progress.total} trials are done, {len(progress.waiting)} to go.")

    def started(self, trial: Trial, progress: Progress) -> None:
        """Nothing: its end says enough."""

    def done(self, trial: Trial, outcome: Outcome, progress: Progress) -> None:
        """Its score, and the time left."""
        self._say(f"[{progress.done + progress.failed}/{progress.total}] {trial.said}: {result(outcome)}; {left(progress)}")

    def failed(self, trial: Trial, failure: Failure, again: bool, progress: Progress) -> None:
        """Why, and whether it is tried again."""
        more = "it is tried again" if again else "the study goes on"
        self._say(f"[{progress.done + progress.failed}/{progress.total}] {trial.said} failed, {more}. {failure.kind}: {failure.message}")

    def close(self, progress: Progress) -> None:
        """Nothing."""


class Panel(Show):
    """One bar for all, and a line for each running trial.

    Args:
        file: a terminal; standard error if left out.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._console = Console(file=sys.stderr if file is None else file)
        columns = (TextColumn("{task.description}", style="bold"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
        self._task: Any = None
        self._progress: Progress | None = None
        self._live = Live(console=self._console, get_renderable=self._drawn, refresh_per_second=4)

    def began(self, progress: Progress) -> None:
        """Draw it."""
        self._progress = progress
        self._task = self._bars.add_task(progress.name, total=progress.total, completed=progress.done + progress.failed, numbers="")
        self._live.start()

    def started(self, trial: Trial, progress: Progress) -> None:
        """It appears by itself."""

    def done(self, trial: Trial, outcome: Outcome, progress: Progress) -> None:
        """A line above the bar."""
        self._console.print(Text.assemble(("✓ ", "green"), trial.said, (f"  {result(outcome)}", "dim")))
        self._bars.update(self._task, completed=progress.done + progress.failed)

    def failed(self, trial: Trial, failure: Failure, again: bool, progress: Progress) -> None:
        """A line above the bar."""
        more = "; it is tried again" if again else ""
        self._console.print(Text.assemble(("✗ ", "red"), trial.said, (f"  {failure.kind}: {failure.message}{more}", "red")))
        self._bars.update(self._task, completed=progress.done + progress.failed)

    def close(self, progress: Progress) -> None:
        """Give the terminal back."""
        self._live.stop()

    def _drawn(self) -> Table:
        grid = Table.grid()
        progress = self._progress
        if progress is None:
            return grid
        failures = f", {progress.failed} failed" if progress.failed else ""
        self._bars.update(self._task, numbers=left(progress) + failures)
        grid.add_row(self._bars)
        now = time.monotonic()
        for trial, began in list(progress.running.values())[:RUNNING]:
            grid.add_row(Text(f"  … {trial.said}  {clock(now - began)}", style="dim"))
        if len(progress.running) > RUNNING:
            grid.add_row(Text(f"  … and {len(progress.running) - RUNNING} more", style="dim"))
        return grid


class Events(Show):
    """One JSON object a line, for programs.

    Args:
        file: where to; standard output if left out.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stdout if file is None else file

    def _say(self, event: str, progress: Progress, more: Mapping[str, Any] | None = None) -> None:
        line = {
            "event": event,
            "study": progress.name,
            **(more or {}),
            "done": progress.done,
            "failed": progress.failed,
            "running": len(progress.running),
            "total": progress.total,
            "seconds_left": progress.seconds_left,
        }
        print(json.dumps(line, ensure_ascii=False, default=str), file=self.file, flush=True)

    def began(self, progress: Progress) -> None:
        """``study_began``."""
        self._say("study_began", progress)

    def started(self, trial: Trial, progress: Progress) -> None:
        """``trial_began``."""
        self._say("trial_began", progress, _named(trial))

    def done(self, trial: Trial, outcome: Outcome, progress: Progress) -> None:
        """``trial_done``."""
        numbers = {name: outcome.numbers.get(name) for name in ("metric", "score", "degenerate", "tokens")}
        self._say("trial_done", progress, {**_named(trial), **numbers, "seconds": outcome.seconds})

    def failed(self, trial: Trial, failure: Failure, again: bool, progress: Progress) -> None:
        """``trial_failed``."""
        self._say("trial_failed", progress, {**_named(trial), "error": f"{failure.kind}: {failure.message}", "again": again})

    def close(self, progress: Progress) -> None:
        """``study_ended``."""
        self._say("study_ended", progress)


def _named(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.key, "backbone": trial.backbone, "task": trial.task, "method": trial.label, "seed": trial.seed,
        **({"cell": dict(trial.cell)} if trial.cell else {}),
    }  # fmt: skip
