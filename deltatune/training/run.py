"""What a run was asked to do, as a value and as the file ``run.yaml`` that replays it."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue, missing_extra
from deltatune.methods.kinds import Method, methods
from deltatune.methods.making import make, settings_of
from deltatune.tasks import Task, TaskData, load_task
from deltatune.tasks.files import task_from_file
from deltatune.tasks.mixture import load_mixture
from deltatune.tasks.streaming import stream_data, stream_file
from deltatune.training.entries import DATA, RUN, checked
from deltatune.training.settings import Settings

RUN_FILE = "run.yaml"


@dataclass(frozen=True)
class DataFile:
    """A user's own data: one file that becomes a task; see ``tasks.files.task_from_file``.

    Attributes:
        path: a CSV, JSONL or Parquet file.
        text: the text column, or two for pairs.
        label: the label column.
        type: a task type, such as classification, regression or generation; seen from the columns if left out.
    """

    path: str
    text: str | tuple[str, ...] = "text"
    label: str = "label"
    type: str | None = None

    def load(self) -> TaskData:
        """Read the file."""
        return task_from_file(self.path, text=self.text, label=self.label, type=self.type)

    def stream(self, **wanted: int) -> TaskData:
        """Read it row by row; ``wanted`` as ``tasks.streaming.stream_file`` takes it."""
        return stream_file(self.path, text=self.text, label=self.label, type=self.type, **wanted)


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result.

    Attributes:
        backbone: alias, folder or hub id.
        task: a task's name, or a file of the user's own.
        methods: one recipe a delta; several are trained together, in order.
        where: sites as in ``attach``; None takes the methods' default roles.
        layers: layers as in ``attach``.
        settings: all knobs.
        fingerprint: hash of the data; a replay on other data is refused.
        versions: of Python and the packages underneath, for people.
    """

    backbone: str
    task: str | DataFile
    methods: tuple[Method, ...]
    where: str | tuple[str, ...] | None = None
    layers: Any = None
    settings: Settings = field(default_factory=Settings)
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_yaml(self) -> str:
        """The text of ``run.yaml``."""
        return written_yaml(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``run_from_dict`` makes an equal run."""
        recipes = [method_to_dict(method) for method in self.methods]
        task = (
            {"task": self.task}
            if isinstance(self.task, str)
            else {"data": {name: value for name, value in _lists(dataclasses.asdict(self.task)).items() if value is not None}}
        )
        return {
            "backbone": self.backbone,
            **task,
            "method": recipes[0] if len(recipes) == 1 else recipes,
            "where": _lists(self.where),
            "layers": _lists(self.layers),
            "settings": self.settings.to_dict(),
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
        }

    def differences(self, other: Run) -> list[str]:
        """What ``other`` would do differently, in words; empty if both give the same result."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        keys = [key for key in (mine | theirs) if not key.startswith("versions")]
        return [f"{key}: {mine.get(key)} here, {theirs.get(key)} there" for key in keys if mine.get(key) != theirs.get(key)]


def read_run(path: str | os.PathLike[str]) -> Run:
    """The run in a ``run.yaml``, or in the run folder that holds one.

    Raises:
        InvalidValue: no such file, not YAML, or entries missing or unknown.
        UnknownName: a method, a field or a setting that is not known here.
    """
    file = Path(path).expanduser()
    place = f"The configuration `{path}`"
    found = file / RUN_FILE if file.is_dir() else file
    return run_from_dict(read_yaml(found, place, "Give a run.yaml, or a folder that holds one."), place)


def read_yaml(path: str | os.PathLike[str], place: str, hint: str = "Give a file that can be read.") -> dict[Any, Any]:
    """The names and values of a YAML file.

    Args:
        path: the file.
        place: what it is, for errors.
        hint: what to do where it cannot be read.

    Raises:
        InvalidValue: no such file, not YAML, or no names and values.
    """
    try:
        entries = _yaml().safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as cause:
        raise InvalidValue(f"{place} cannot be read: {cause}. {hint}") from cause
    except _yaml().YAMLError as cause:
        raise InvalidValue(f"{place} is not YAML: {cause}") from cause
    if not isinstance(entries, dict):
        raise InvalidValue(f"{place} holds {type(entries).__name__} where names and values are wanted.")
    return entries


def run_from_dict(written: Mapping[Any, Any], place: str) -> Run:
    """The inverse of ``Run.to_dict``.

    Args:
        written: the entries of a ``run.yaml``.
        place: where they stand, for errors.

    Raises:
        InvalidValue: entries missing or of another kind.
        UnknownName: an entry, a method, a field or a setting that is not known here.
    """
    entries = checked(written, RUN, place)
    lacking = [name for name in ("backbone", "method") if name not in entries]
    if ("task" in entries) == ("data" in entries):
        if "task" in entries:
            raise InvalidValue(f"{place} has both `task` and `data`. A run has one of them.")
        lacking.append("task")
    if lacking:
        raise InvalidValue(f"{place} does not say its {' and '.join(lacking)}. Add it.")
    recipes = entries["method"] if isinstance(entries["method"], list) else [entries["method"]]
    return Run(
        backbone=entries["backbone"],
        task=entries["task"] if "task" in entries else data_file(entries["data"], place),
        methods=tuple(method_from_dict({"name": recipe} if isinstance(recipe, str) else recipe) for recipe in recipes),
        where=_tuples(entries.get("where")),
        layers=entries.get("layers"),
        settings=Settings.of(entries.get("settings", {})),
        fingerprint=entries.get("fingerprint", ""),
        versions=entries.get("versions", {}),
    )


def written_yaml(values: Mapping[str, Any]) -> str:
    """Names and values as a YAML file holds them, in their order."""
    return str(_yaml().safe_dump(_lists(values), sort_keys=False, allow_unicode=True, width=120))


def data_file(written: dict[str, Any], place: str) -> DataFile:
    """A user's own data, as a configuration describes it.

    Raises:
        UnknownName: an entry that does not belong there.
        InvalidValue: no path, or a value of another kind.
    """
    entries = checked(written, DATA, f"`data` in {place[0].lower()}{place[1:]}")
    if "path" not in entries:
        raise InvalidValue(f"{place} does not say the `path` of its `data`. Add it.")
    return DataFile(**_tuples(entries))


def method_to_dict(method: Method) -> dict[str, Any]:
    """Name and fields, as plain values."""
    return {"name": methods.name_of(type(method)), **_lists(settings_of(method))}


def method_from_dict(entries: Mapping[str, Any]) -> Method:
    """The inverse of ``method_to_dict``.

    Raises:
        InvalidValue: no name among the entries.
    """
    if "name" not in entries:
        raise InvalidValue(f"The method {dict(entries)} has no `name`. Add one, such as `name: lora`.")
    return make(str(entries["name"]), {name: value for name, value in entries.items() if name != "name"})


def load_data(task: str | Task | TaskData | DataFile, settings: Settings | None = None) -> TaskData:
    """The rows of whatever names a task; of several names with commas between, a mixture.

    Args:
        task: what names it.
        settings: the mixture's temperature, and whether rows are streamed.

    Raises:
        InvalidValue: rows that are here already, or a mixture, are to be streamed.
    """
    settings = settings or Settings()
    if isinstance(task, TaskData):
        if settings.streaming != (task.stream is not None):
            told = (
                "are all here; leave `streaming` out"
                if settings.streaming
                else "are streamed; say `streaming=True`, and how many `max_steps`"
            )
            raise InvalidValue(f"The rows of `{task.task.name}` {told}.")
        return task
    names = [name.strip() for name in task.split(",") if name.strip()] if isinstance(task, str) and "," in task else []
    if names and settings.streaming:
        raise InvalidValue("A mixture draws from all rows of its tasks, so it cannot be streamed. Leave `streaming` out, or name one task.")
    if names:
        return load_mixture(names, settings.temperature)
    if settings.streaming:
        wanted = {"validation": settings.eval_rows, "test": settings.test_rows, "seed": settings.seed}
        return task.stream(**wanted) if isinstance(task, DataFile) else stream_data(task, **wanted)
    return task.load() if isinstance(task, DataFile) else load_task(task)


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in ("deltatune", "torch", "transformers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _lists(value: Any) -> Any:
    """The same with lists for tuples and ranges, which plain YAML does not have."""
    if isinstance(value, Mapping):
        return {name: _lists(entry) for name, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _flat(entries: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(entries, dict):
        return {prefix: entries}
    return {key: value for name, entry in entries.items() for key, value in _flat(entry, f"{prefix}.{name}" if prefix else name).items()}


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as cause:
        raise missing_extra("yaml", "train") from cause
    return yaml
