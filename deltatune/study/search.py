"""Learning rates by Optuna, under one budget for all methods. The store is the only memory: Optuna's is rebuilt from it each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from deltatune.errors import missing_extra
from deltatune.study.design import Entry, Rates, Study
from deltatune.study.trial import Trial
from deltatune.training.run import DataFile

WORST = -1e9
"""The value of a rate whose training failed."""

NAME = "multiple"


@dataclass
class Search:
    """One method's rate on one backbone.

    Attributes:
        study: whose settings hold.
        rates: budget and range.
        entry: the method.
        backbone: the backbone.
        values: number of the proposal -> task -> best validation score.
        rate_of: number of the proposal -> learning rate.
    """

    study: Study
    rates: Rates
    entry: Entry
    backbone: str
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    rate_of: dict[int, float] = field(default_factory=dict)

    @property
    def own(self) -> float:
        """The method's own rate."""
        given = self.entry.settings.get("lr", self.study.settings.get("lr"))
        return min(method.learning_rate for method in self.entry.methods) if given is None else float(given)

    @property
    def tasks(self) -> tuple[str | DataFile, ...]:
        """On which it is searched."""
        return self.rates.tasks or self.study.tasks[:1]

    def take(self, trial: Trial, history: Iterable[Mapping[str, Any]] | None) -> None:
        """A proposal was tried on a task; without a history it failed."""
        number = int(trial.options["search"])
        scores = [float(entry["eval_score"]) for entry in history or () if "eval_score" in entry]
        self.rate_of[number] = float(trial.run.settings.lr or 0.0)
        self.values.setdefault(number, {})[trial.task] = max(scores, default=WORST)

    @property
    def finished(self) -> dict[int, float]:
        """Number of the proposal -> mean over tasks, of those that were tried on all."""
        return {number: fmean(found.values()) for number, found in self.values.items() if len(found) == len(self.tasks)}

    def next(self) -> Iterator[Trial]:
        """The trials of the next proposal, one a task; none where the budget is spent or a proposal is still being tried."""
        number = len(self.finished)
        if number >= self.rates.trials or len(self.values) > number:
            return
        lr = self.own * self._multiple(number)
        for task in self.tasks:
            trial = self.study.trial(self.entry, self.backbone, task, {}, self.study.seeds[0])
            settings = replace(trial.run.settings, lr=lr, test_rows=1, evaluations=max(1, trial.run.settings.evaluations))
            options = {**trial.options, "search": number}
            yield replace(trial, run=replace(trial.run, settings=settings), options=options, purpose="search", cell={"lr": lr})

    @property
    def best(self) -> float:
        """The rate of the best mean, the method's own where nothing succeeded."""
        found = {number: value for number, value in self.finished.items() if value > WORST / 2}
        return self.rate_of[max(found, key=found.__getitem__)] if found else self.own

    def _multiple(self, number: int) -> float:
        """What to try next: the method's own rate first, then what Optuna proposes."""
        if number == 0 and self.rates.low <= 1 <= self.rates.high:
            return 1.0
        optuna = _optuna()
        range_ = optuna.distributions.FloatDistribution(self.rates.low, self.rates.high, log=True)
        sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=number)
        course = optuna.create_study(direction="maximize", sampler=sampler)
        for tried, value in self.finished.items():
            multiple = min(max(self.rate_of[tried] / self.own, self.rates.low), self.rates.high)
            course.add_trial(optuna.trial.create_trial(params={NAME: multiple}, distributions={NAME: range_}, value=value))
        return float(course.ask({NAME: range_}).params[NAME])


def searches_of(study: Study) -> dict[tuple[str, str], Search]:
    """(backbone, label) -> search, of all methods that train; none where the study takes the methods' own rates."""
    if study.rates is None:
        return {}
    training = [entry for entry in study.entries if entry.procedure == "train" and any(method.trains for method in entry.methods)]
    tried = [(backbone, entry) for backbone in study.backbones for entry in training if backbone in (entry.backbones or study.backbones)]
    return {(backbone, entry.label): Search(study, study.rates, entry, backbone) for backbone, entry in tried}


def with_rate(trial: Trial, lr: float) -> Trial:
    """The trial with a rate that was found; it goes by its key in the store, which does not know the rate."""
    return replace(trial, run=replace(trial.run, settings=replace(trial.run.settings, lr=lr)), known_as=trial.key)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as cause:
        raise missing_extra("optuna", "study") from cause
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
