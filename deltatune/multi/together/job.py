"""``Job``: what one of several trainings shall do; what ``dt.train`` is told of one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.errors import InvalidValue
from deltatune.methods.kinds import Method, methods
from deltatune.methods.making import make
from deltatune.tasks import Task, TaskData
from deltatune.training.run import DataFile
from deltatune.training.settings import Settings

if TYPE_CHECKING:
    from deltatune.training.result import Result


class Job:
    """One training among several on the same backbone.

    Args:
        task: a task's name, or several with commas between; its definition, its rows, or a ``DataFile`` of your own.
        method: a recipe, its name, or several that train together.
        name: of the job; made of task and method if left out.
        where: sites, as in ``attach``.
        layers: layers, as in ``attach``.
        out: the run's folder; a folder of the job's name below that of all jobs if left out.
        settings: the fields of ``training.settings.Settings``: ``seed``, ``lr``, ``max_steps``, ``batch_size``, ...

    Raises:
        UnknownName: a method, field or setting nobody knows.
        InvalidValue: a value out of its range, or no method.

    Example:
        >>> job = Job("bbc-news", "lora", seed=1, lr=1e-3, max_steps=50)
        >>> job.name, job.settings.seed
        ('bbc-news-lora', 1)
    """

    def __init__(
        self,
        task: str | Task | TaskData | DataFile,
        method: str | Method | Sequence[str | Method],
        *,
        name: str | None = None,
        where: Any = None,
        layers: Any = None,
        out: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self.task = task
        listed = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
        strange = next((one for one in listed if not isinstance(one, str | Method)), None)
        if strange is not None:
            raise InvalidValue(f"A job was given {strange!r} as its method. Give a name, or an instance such as LoRA(rank=8).")
        self.methods = tuple(make(one) if isinstance(one, str) else one for one in listed)
        if not self.methods:
            raise InvalidValue("A job was given no method. Name one, such as `lora`.")
        if callable(where):
            raise InvalidValue("A job was given a function as `where`, which its run.yaml cannot hold. Write names, or list its paths.")
        self.where = tuple(where) if isinstance(where, list) else where
        self.layers = layers
        self.out = None if out is None else Path(out).expanduser()
        self.settings = Settings.of(settings)
        if name is not None and (Path(name).name != name or "\\" in name or name in ("", "..")):
            raise InvalidValue(f"A job was given the name {name!r}, but its folder is called so. Give a name without slashes.")
        self.name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([_said(task), *map(_name, self.methods)])).strip("-.")

    def __repr__(self) -> str:
        return f"Job({self.name!r}, {_said(self.task)}, {', '.join(map(str, self.methods))})"


def _said(task: str | Task | TaskData | DataFile) -> str:
    if isinstance(task, DataFile):
        return Path(task.path).stem
    return task if isinstance(task, str) else task.name if isinstance(task, Task) else task.task.name


def _name(method: Method) -> str:
    return methods.name_of(type(method))


def named(jobs: Sequence[Job]) -> list[str]:
    """A name for each job: its own, numbered from the second of that name on.

    >>> named([Job("bbc-news", "lora"), Job("bbc-news", "lora", seed=1), Job("bbc-news", "ia3")])
    ['bbc-news-lora', 'bbc-news-lora-2', 'bbc-news-ia3']
    """
    names: list[str] = []
    for job in jobs:
        name, number = job.name, 1
        while name in names:
            number += 1
            name = f"{job.name}-{number}"
        names.append(name)
    return names


@dataclass
class Outcome:
    """What became of one job.

    Attributes:
        job: the job.
        name: by which it went.
        result: its numbers and objects; None where it failed, or was finished before.
        error: why it failed, whatever raised it; the others went on.
        apart: why it was trained by itself; None where it shared the forward.
        numbers: what its ``metrics.json`` says; empty where it failed.
    """

    job: Job
    name: str
    result: Result | None = None
    error: Exception | None = None
    apart: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
