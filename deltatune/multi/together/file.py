"""``jobs.yaml``: many jobs on one backbone, each written as in a ``run.yaml``, and what they have in common once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.errors import DeltaError, InvalidValue
from deltatune.multi.together.job import Job
from deltatune.training.entries import LAYERS, MAPPING, METHODS, NUMBER, TEXT, TEXTS, Kind, checked
from deltatune.training.run import data_file, method_from_dict, read_yaml

JOB = {
    "name": TEXT,
    "task": TEXT,
    "data": MAPPING,
    "method": METHODS,
    "where": TEXTS,
    "layers": LAYERS,
    "out": TEXT,
    "settings": MAPPING,
}
JOBS = {
    "backbone": TEXT,
    "out": TEXT,
    "at_once": NUMBER,
    "tokens": NUMBER,
    "settings": MAPPING,
    "jobs": Kind("a list of jobs", lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)),
}


@dataclass(frozen=True)
class JobsFile:
    """What a ``jobs.yaml`` asks for.

    Attributes:
        backbone: alias, folder or hub id; None where the file does not say.
        jobs: in order.
        out: the folder of their runs' folders.
        at_once: most jobs at the same time.
        tokens: most tokens of a shared forward.
    """

    backbone: str | None
    jobs: tuple[Job, ...]
    out: str | None = None
    at_once: int | None = None
    tokens: int | None = None


def read_jobs(path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> JobsFile:
    """The jobs in a file.

    Args:
        path: the file.
        settings: of all jobs, over what the file says.

    Raises:
        InvalidValue: no such file, not YAML, or entries missing.
        UnknownName: an entry, a method, a field or a setting that is not known here.
    """
    place = f"The file of jobs `{path}`"
    entries = checked(read_yaml(path, place), JOBS, place)
    if "jobs" not in entries:
        raise InvalidValue(f"{place} has no `jobs`. Add a list of them, each with its `task` and `method`.")
    common = entries.get("settings", {})
    jobs = tuple(
        _job(written, common, settings or {}, f"Job {number} in {place[0].lower()}{place[1:]}")
        for number, written in enumerate(entries["jobs"], 1)
    )
    return JobsFile(entries.get("backbone"), jobs, entries.get("out"), entries.get("at_once"), entries.get("tokens"))


def _job(written: Mapping[Any, Any], common: Mapping[str, Any], over: Mapping[str, Any], place: str) -> Job:
    entries = checked(written, JOB, place)
    if ("task" in entries) == ("data" in entries):
        found = "both `task` and `data`" if "task" in entries else "neither `task` nor `data`"
        raise InvalidValue(f"{place} has {found}. A job has one of them.")
    if "method" not in entries:
        raise InvalidValue(f"{place} does not say its `method`. Add it.")
    recipes = entries["method"] if isinstance(entries["method"], list) else [entries["method"]]
    try:
        return Job(
            entries["task"] if "task" in entries else data_file(entries["data"], place),
            [method_from_dict({"name": recipe} if isinstance(recipe, str) else recipe) for recipe in recipes],
            name=entries.get("name"),
            where=entries.get("where"),
            layers=entries.get("layers"),
            out=entries.get("out"),
            **{**common, **entries.get("settings", {}), **over},
        )
    except DeltaError as error:
        raise type(error)(f"{place}: {error}") from error
