"""How far a study is, and how long it will take yet, from what its trials took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean

from deltatune.study.record import Record
from deltatune.study.trial import Trial

Sort = tuple[str, str, str]


class Pace:
    """Seconds of trials, remembered by procedure, backbone and method; of a kind not met yet, the mean of those nearest to it."""

    def __init__(self) -> None:
        self._seconds: dict[Sort, list[float]] = defaultdict(list)

    def learn(self, procedure: str, backbone: str, method: str, seconds: float) -> None:
        """A trial took so long."""
        self._seconds[procedure, backbone, method].append(seconds)

    def of(self, trial: Trial) -> float | None:
        """What a trial will take; None before the first has ended.

        The mean of its own kind, else of its procedure on its backbone, else of all.
        """
        own = self._seconds.get((trial.procedure, trial.backbone, trial.label))
        beside = [one for sort, all_ in self._seconds.items() for one in all_ if sort[:2] == (trial.procedure, trial.backbone)]
        found = own or beside or [one for all_ in self._seconds.values() for one in all_]
        return mean(found) if found else None


@dataclass
class Progress:
    """How far a study is.

    Attributes:
        name: of the study.
        total: trials.
        done: of them.
        failed: of them, for good.
        at_once: units that run at the same time.
        waiting: keys and trials that are still to be begun.
        running: trials with the moment they began.
        pace: what trials take.
    """

    name: str
    total: int
    done: int = 0
    failed: int = 0
    at_once: int = 1
    waiting: dict[str, Trial] = field(default_factory=dict)
    running: dict[str, tuple[Trial, float]] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def learn(self, records: Iterable[Record]) -> None:
        """From trials that were done before."""
        for record in records:
            if record.seconds is not None:
                self.pace.learn(record.procedure, record.backbone, record.method, record.seconds)

    @property
    def seconds_left(self) -> float | None:
        """An estimate; None before there is anything to go by."""
        now, left = time.monotonic(), 0.0
        for trial, began in self.running.values():
            took = self.pace.of(trial)
            if took is None:
                return None
            left += max(took - (now - began), 0.0)
        for trial in self.waiting.values():
            took = self.pace.of(trial)
            if took is None:
                return None
            left += took
        return left / self.at_once
