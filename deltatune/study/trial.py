"""A trial: one cell of a study's grid, as a value whose hash is its name in the store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaError
from deltatune.study.surroundings import Surroundings
from deltatune.tasks import get_task
from deltatune.training.run import Run, run_from_dict

KEY = 16
"""Hexadecimal digits of a key: 64 bits, so that a million trials share none."""

LATER: dict[str, Any] = {"train_rows": 0}
"""Settings that came when there were studies already, with the value that means what was done before."""


@dataclass(frozen=True)
class Trial:
    """One cell of a grid.

    Attributes:
        run: what is trained on what, with all settings.
        label: the method's name in tables.
        procedure: how the trial is carried out; see ``study.procedures``.
        cell: the values of the settings in which trials of one method differ, beside the seed.
        options: what else the procedure is told.
        purpose: ``trial``, or ``search`` where it only helps to find a learning rate.
        known_as: its key, where that is not the hash of what it has become.
    """

    run: Run
    label: str
    procedure: str = "train"
    cell: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    purpose: str = "trial"
    known_as: str = ""

    @property
    def key(self) -> str:
        """Hash of everything that decides the result; neither the label nor who asks for it does.

        A setting that came later is left out where it changes nothing, so that trials that are done keep their keys.
        """
        if self.known_as:
            return self.known_as
        run = {name: value for name, value in self.run.to_dict().items() if name not in ("versions", "fingerprint")}
        run["settings"] = {name: value for name, value in run["settings"].items() if name not in LATER or value != LATER[name]}
        content = [self.procedure, dict(self.options), run]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:KEY]

    @property
    def backbone(self) -> str:
        """Alias, folder or hub id."""
        return self.run.backbone

    @property
    def task(self) -> str:
        """The task's name, or that of the file of one's own."""
        return self.run.task if isinstance(self.run.task, str) else Path(self.run.task.path).stem

    @property
    def category(self) -> str:
        """Of the task; of a file of one's own ``own data``, of several tasks ``mixture``."""
        if not isinstance(self.run.task, str):
            return "own data"
        return "mixture" if "," in self.run.task else get_task(self.run.task).category

    @property
    def seed(self) -> int:
        """Of weights, dropout and the order of rows."""
        return self.run.settings.seed

    @property
    def said(self) -> str:
        """In a few words, for people."""
        cell = "".join(f", {name} {value}" for name, value in self.cell.items())
        return f"{self.label} on {self.task}, {Path(self.backbone).name}{cell}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``trial_from_dict`` makes an equal trial."""
        return {
            "label": self.label,
            "procedure": self.procedure,
            "cell": dict(self.cell),
            "options": dict(self.options),
            "purpose": self.purpose,
            "known_as": self.known_as,
            "run": self.run.to_dict(),
        }


def trial_from_dict(written: Mapping[str, Any]) -> Trial:
    """The inverse of ``Trial.to_dict``.

    Raises:
        DeltaError: what the trial names is not known here any more.
    """
    try:
        run = run_from_dict(written["run"], "The trial")
    except DeltaError as error:
        raise type(error)(f"The trial `{written['label']}` in the store: {error}") from error
    rest = {name: written[name] for name in ("label", "procedure", "cell", "options", "purpose", "known_as")}
    return Trial(run, **rest)


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        key: of the trial.
        numbers: as ``metrics.json`` holds them: score, metric, seconds, ...; procedures may add to them.
        history: losses and validation scores by step.
        seconds: the trial took, from loading the backbone to the last file.
        place: where it was carried out, if that is not the driver's process.
    """

    key: str
    numbers: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    place: Surroundings | None = None


@dataclass(frozen=True)
class Failure:
    """Why a trial came to nothing.

    Attributes:
        key: of the trial.
        kind: the error's class.
        message: what it said.
        traceback: where.
        lasting: it would come again, so there is no point in another attempt.
        seconds: until it failed.
    """

    key: str
    kind: str
    message: str
    traceback: str = ""
    lasting: bool = False
    seconds: float = 0.0
