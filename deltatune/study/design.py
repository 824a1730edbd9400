"""A study as data: which trials there are. Read from strict YAML, written back the same."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from deltatune.errors import DeltaError, InvalidValue
from deltatune.methods import Frozen, LoRA
from deltatune.methods.kinds import Method, methods
from deltatune.study.trial import Trial
from deltatune.tasks import get_task, tasks
from deltatune.training.entries import LAYERS, MAPPING, NUMBER, TEXT, TEXTS, Kind, checked
from deltatune.training.run import DataFile, Run, data_file, method_from_dict, method_to_dict, read_yaml
from deltatune.training.settings import Settings

Profile = Literal["quick", "full"]
Keep = Literal["nothing", "deltas"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CATEGORY = "category:"
RANDOM = "random-delta"


def _is_list(fits: Any) -> Any:
    return lambda value: isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


STUDY = {
    "name": TEXT,
    "experiment": TEXT,
    "profile": Kind("quick or full", lambda value: value in ("quick", "full")),
    "backbones": TEXTS,
    "tasks": Kind("a list of names, or of files of your own", _is_list(lambda one: isinstance(one, str) or _is_mapping(one))),
    "methods": Kind("a list of methods", _is_list(lambda one: isinstance(one, str) or _is_mapping(one))),
    "settings": MAPPING,
    "grid": Kind(
        "settings, each with a list of values", lambda value: _is_mapping(value) and all(isinstance(one, list) for one in value.values())
    ),
    "points": Kind("a list of settings with their values", _is_list(_is_mapping)),
    "baselines": Kind("true or false", lambda value: isinstance(value, bool)),
    "repeated": Kind("a list of names of its tasks", _is_list(lambda one: isinstance(one, str))),
    "seeds": Kind("whole numbers", _is_list(lambda one: isinstance(one, int) and not isinstance(one, bool))),
    "keep": Kind("nothing or deltas", lambda value: value in ("nothing", "deltas")),
    "retries": NUMBER,
    "time_limit": Kind("a number of seconds", lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0),
    "rates": MAPPING,
}
ENTRY = {
    "label": TEXT,
    "method": Kind("a method's name, or its `name` and fields, or a list of these", lambda value: bool(value)),
    "where": TEXTS,
    "layers": LAYERS,
    "settings": MAPPING,
    "backbones": TEXTS,
    "tasks": TEXTS,
    "procedure": TEXT,
    "options": MAPPING,
}
RATES = {
    "trials": NUMBER,
    "low": Kind("a number", lambda value: isinstance(value, float | int | str)),
    "high": Kind("a number", lambda value: isinstance(value, float | int | str)),
    "tasks": Kind("a list of names", _is_list(lambda one: isinstance(one, str))),
}


@dataclass(frozen=True)
class Entry:
    """A method of a study.

    Attributes:
        label: its name in tables.
        methods: one recipe a delta.
        where: sites as in ``attach``; None takes the methods' default roles.
        layers: layers as in ``attach``.
        settings: over the study's.
        backbones: of the study's, those on which it is tried; all if left out.
        tasks: of the study's, those on which it is tried; all if left out.
        procedure: how its trials are carried out.
        options: what else the procedure is told.
    """

    label: str
    methods: tuple[Method, ...]
    where: str | tuple[str, ...] | None = None
    layers: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    backbones: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    procedure: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As ``study.yaml`` holds it; what is left out has its default."""
        recipes = [method_to_dict(method) for method in self.methods]
        written = {
            "label": self.label,
            "method": recipes[0] if len(recipes) == 1 else recipes,
            "where": list(self.where) if isinstance(self.where, tuple) else self.where,
            "layers": self.layers,
            "settings": dict(self.settings),
            "backbones": list(self.backbones) or None,
            "tasks": list(self.tasks) or None,
            "procedure": None if self.procedure == "train" else self.procedure,
            "options": dict(self.options),
        }
        return {name: value for name, value in written.items() if value not in (None, {})}


@dataclass(frozen=True)
class Rates:
    """A search for learning rates: so many trials for each method and backbone, log-uniform, chosen by validation scores.

    Attributes:
        trials: the budget, equal for all methods.
        low: smallest rate, as a multiple of the method's own.
        high: largest rate, as a multiple of the method's own.
        tasks: on which it is searched; the mean of their validation scores decides. The study's first task if left out.
    """

    trials: int
    low: float = 0.1
    high: float = 10.0
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.trials < 1 or not 0 < self.low < self.high:
            raise InvalidValue(f"`rates` has {self}. It wants at least 1 of `trials`, and `low` above 0 and below `high`.")

    def to_dict(self) -> dict[str, Any]:
        """As ``study.yaml`` holds it."""
        return {"trials": self.trials, "low": self.low, "high": self.high, **({"tasks": list(self.tasks)} if self.tasks else {})}


@dataclass(frozen=True)
class Study:
    """A grid of trials: backbones x tasks x methods x grid x seeds, with two baselines for each task.

    Attributes:
        name: in the store, and of its folder.
        backbones: aliases, folders or hub ids.
        tasks: names, or files of one's own.
        methods: with labels.
        settings: of all trials; fields of ``training.settings.Settings``.
        grid: setting -> values; every combination is tried.
        points: in place of a grid, where not every combination is wanted: the values of one cell each.
        seeds: each trial is done once with each.
        repeated: tasks that see every seed, while the others see the first only; all do if left out.
        experiment: whose report and claims it is for; see ``study.experiments``.
        profile: ``quick`` tries the machinery and reaches no verdict; ``full`` does.
        keep: what is kept of a trial besides its numbers.
        retries: further attempts after an error that is not of ours.
        time_limit: most seconds of one trial; None sets none.
        rates: how learning rates are found; None takes the methods' own.
        baselines: whether the frozen backbone and a random delta are in; a study that scores nothing leaves them out.

    Raises:
        InvalidValue: a value out of its range, nothing to do, or two methods of one label.
        UnknownName: a task, method, field or setting nobody knows.
    """

    name: str
    backbones: tuple[str, ...]
    tasks: tuple[str | DataFile, ...]
    methods: tuple[Entry, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    points: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    repeated: tuple[str, ...] = ()
    experiment: str = "performance"
    profile: Profile = "full"
    keep: Keep = "nothing"
    retries: int = 1
    time_limit: float | None = None
    rates: Rates | None = None
    baselines: bool = True

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InvalidValue(
                f"A study cannot be called `{self.name}`: its name becomes a folder. Take letters, digits, `-`, `_` and `.`."
            )
        for what in ("backbones", "tasks", "methods", "seeds"):
            found = [one.label if isinstance(one, Entry) else one for one in getattr(self, what)]
            if not found:
                raise InvalidValue(f"The study `{self.name}` has no {what}. Name at least one.")
            if twice := {str(one) for one in found if found.count(one) > 1}:
                raise InvalidValue(
                    f"The study `{self.name}` has `{min(twice)}` twice among its {what}. Keep one, or give it another label."
                )
        for task in self.tasks:
            if isinstance(task, str) and "," not in task:
                get_task(task)
        for what, own in (("backbones", self.backbones), ("tasks", self.tasks)):
            if strange := {name for entry in self.methods for name in getattr(entry, what)} - set(own):
                raise InvalidValue(
                    f"A method of the study `{self.name}` is for `{min(strange)}`, but its {what} are {', '.join(map(str, own))}. Add it."
                )
        if strange := set(self.repeated) - set(self.tasks):
            raise InvalidValue(f"The study `{self.name}` repeats `{min(strange)}`, which is not among its tasks. Add it there.")
        if self.profile not in get_args(Profile) or self.keep not in get_args(Keep):
            raise InvalidValue(
                f"The study `{self.name}` has profile {self.profile} and keeps {self.keep}: quick or full, nothing or deltas."
            )
        if self.grid and self.points:
            raise InvalidValue(f"The study `{self.name}` has a `grid` and `points`. Write all combinations as a grid, or some as points.")
        self._check_trials()

    def _check_trials(self) -> None:
        """Every method in every cell makes a trial of its own. Asked of one task for each choice of methods, and of one seed."""
        chosen = {tuple(entry.label for entry in self.entries if _is_for(entry.tasks, task)): task for task in reversed(self.tasks)}
        for labels, task in chosen.items():
            seen: dict[str, Trial] = {}
            for cell, entry in itertools.product(self.cells, self.entries):
                trial = self.trial(entry, self.backbones[0], task, cell, self.seeds[0])
                if entry.label in labels and (other := seen.setdefault(trial.key, trial)) is not trial:
                    raise InvalidValue(f"The study `{self.name}` asks for one trial twice: as `{other.said}` and as `{trial.said}`.")

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The methods, with the baselines that were not named."""
        labels = {entry.label for entry in self.methods}
        return (*self.methods, *(entry for entry in baselines() if self.baselines and entry.label not in labels))

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values, or the points; one empty one without either."""
        if self.points:
            return [dict(point) for point in self.points]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def trials(self) -> Iterator[Trial]:
        """All trials, seed by seed and task by task, so that a study that is stopped early can be reported on."""
        for seed, task, backbone, cell in itertools.product(self.seeds, self.tasks, self.backbones, self.cells):
            if seed != self.seeds[0] and not _is_for(self.repeated, task):
                continue
            for entry in self.entries:
                if _is_for(entry.backbones, backbone) and _is_for(entry.tasks, task):
                    yield self.trial(entry, backbone, task, cell, seed)

    def trial(self, entry: Entry, backbone: str, task: str | DataFile, cell: Mapping[str, Any], seed: int) -> Trial:
        """One cell."""
        settings = Settings.of({**self.settings, **entry.settings, **cell, "seed": seed})
        run = Run(backbone, task, entry.methods, entry.where, entry.layers, settings)
        return Trial(run, entry.label, entry.procedure, cell, entry.options)

    def to_dict(self) -> dict[str, Any]:
        """As ``study.yaml`` holds it."""
        return {
            "name": self.name,
            "experiment": self.experiment,
            "profile": self.profile,
            "backbones": list(self.backbones),
            "tasks": [task if isinstance(task, str) else {**_file(task)} for task in self.tasks],
            "methods": [entry.to_dict() for entry in self.methods],
            "settings": dict(self.settings),
            "grid": {name: list(values) for name, values in self.grid.items()},
            "seeds": list(self.seeds),
            **({"repeated": list(self.repeated)} if self.repeated else {}),
            "keep": self.keep,
            "retries": self.retries,
            **({} if self.time_limit is None else {"time_limit": self.time_limit}),
            **({} if self.rates is None else {"rates": self.rates.to_dict()}),
            **({"points": [dict(point) for point in self.points]} if self.points else {}),
            **({} if self.baselines else {"baselines": False}),
        }


def _is_for(chosen: Sequence[str], one: str | DataFile) -> bool:
    """Whether something was chosen; where nothing was, everything is."""
    return not chosen or one in chosen


def _file(task: DataFile) -> dict[str, Any]:
    written = {"path": task.path, "text": task.text, "label": task.label, "type": task.type}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in written.items() if value is not None}


def baselines() -> tuple[Entry, Entry]:
    """What every study has: the frozen backbone, and a delta of random tensors that nobody trained."""
    return Entry("frozen", (Frozen(),)), Entry(RANDOM, (LoRA(),), procedure="untrained")


def read_study(path: str | os.PathLike[str]) -> Study:
    """The study in a file.

    Raises:
        InvalidValue: no such file, not YAML, or entries missing or of another kind.
        UnknownName: an entry, a task, a method, a field or a setting that is not known here.
    """
    place = f"The study `{path}`"
    return study_from_dict(read_yaml(path, place, "Give a study.yaml, or the name of an experiment."), place)


def study_from_dict(written: Mapping[Any, Any], place: str = "The study") -> Study:
    """The inverse of ``Study.to_dict``.

    Args:
        written: the entries of a ``study.yaml``.
        place: where they stand, for errors.

    Raises:
        InvalidValue: entries missing or of another kind.
        UnknownName: an entry, a task, a method, a field or a setting that is not known here.
    """
    entries = checked(written, STUDY, place)
    if lacking := [name for name in ("name", "backbones", "tasks", "methods") if name not in entries]:
        raise InvalidValue(f"{place} does not say its {' and '.join(f'`{name}`' for name in lacking)}. Add it.")
    backbones, here = entries.pop("backbones"), place[0].lower() + place[1:]
    try:
        values: dict[str, Any] = {
            **entries,
            "backbones": (backbones,) if isinstance(backbones, str) else tuple(backbones),
            "tasks": tuple(_tasks(entries["tasks"], place)),
            "methods": tuple(_entry(one, f"Method {number} of {here}") for number, one in enumerate(entries["methods"], 1)),
            "grid": {name: tuple(options) for name, options in entries.get("grid", {}).items()},
            "points": tuple(entries.get("points", ())),
            "repeated": tuple(entries.get("repeated", ())),
            "seeds": tuple(entries.get("seeds", (0,))),
        }
        if "rates" in entries:
            values["rates"] = _rates(entries["rates"], place)
        return Study(**values)
    except DeltaError as error:
        raise error if str(error).startswith((place, "Method")) else type(error)(f"{place}: {error}") from error


def _tasks(written: Sequence[Any], place: str) -> Iterator[str | DataFile]:
    """Names as they stand; of a category, or of all, those whose data is here."""
    for one in written:
        if not isinstance(one, str):
            yield data_file(one, place)
        elif one == "all" or one.startswith(CATEGORY):
            wanted = one.removeprefix(CATEGORY)
            known = [get_task(name) for name in tasks]
            found = [task.name for task in known if task.is_runnable and wanted in ("all", task.category)]
            if not found:
                raise InvalidValue(f"{place} asks for `{one}`, but no task of it can be run here. See `deltatune tasks list --runnable`.")
            yield from found
        else:
            yield one


def _entry(written: str | Mapping[str, Any], place: str) -> Entry:
    """A name; a ``name`` with fields; or an entry with a ``method``, as in ``jobs.yaml``."""
    if isinstance(written, str) or "method" not in written:
        written = {"method": written}
    entries = checked(written, ENTRY, place)
    recipes = entries["method"] if isinstance(entries["method"], list) else [entries["method"]]
    found = tuple(method_from_dict({"name": recipe} if isinstance(recipe, str) else recipe) for recipe in recipes)
    where = entries.get("where")
    among = {what: (one,) if isinstance(one := entries.get(what, ()), str) else tuple(one) for what in ("backbones", "tasks")}
    return Entry(
        label=entries.get("label", "+".join(methods.name_of(type(method)) for method in found)),
        methods=found,
        where=tuple(where) if isinstance(where, list) else where,
        layers=entries.get("layers"),
        settings=entries.get("settings", {}),
        procedure=entries.get("procedure", "train"),
        options=entries.get("options", {}),
        **among,
    )


def _rates(written: Mapping[str, Any], place: str) -> Rates:
    entries = checked(written, RATES, f"`rates` in {place[0].lower()}{place[1:]}")
    if "trials" not in entries:
        raise InvalidValue(f"{place} has `rates` without `trials`, the budget of each method. Add it.")
    numbers = {name: float(entries[name]) for name in ("low", "high") if name in entries}
    return Rates(int(entries["trials"]), tasks=tuple(entries.get("tasks", ())), **numbers)
