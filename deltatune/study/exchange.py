"""A report's folder taken into a store: what was done elsewhere is done here, and the study goes on from there."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import InvalidValue
from deltatune.study.design import Study, read_study
from deltatune.study.store.schema import DONE
from deltatune.study.store.store import Store
from deltatune.study.store.writer import COLUMNS, RENAMED
from deltatune.study.surroundings import Surroundings
from deltatune.study.trial import Outcome

LONGEST = 2**31 - 1
"""Characters of one field of the CSV; a learning curve may be long."""


@dataclass(frozen=True)
class Taken:
    """What became of a report's results.

    Attributes:
        study: its name in the store.
        taken: trials that are done now, and were not.
        known: trials that were done here already; they stay what they are.
        strange: results that belong to no trial of the design.
    """

    study: str
    taken: int
    known: int
    strange: int


def take_results(store: Store, folder: str | os.PathLike[str], *, study: Study | None = None, change: bool = False) -> Taken:
    """Enter the study of a report's folder with the results in it; trials that failed or were not done there wait here.

    Args:
        store: where the study goes.
        study: takes the place of the folder's design; results of trials that it does not have are left out.
        folder: holds ``study.yaml``, ``results.csv`` and ``machines.json``, as ``deltatune study report`` writes them.
        change: let a study of that name take the folder's design.

    Raises:
        InvalidValue: the study searches for learning rates; a file is missing or is not what a report writes; or the store has the study
            with another design.
        Busy: another process runs the study.
    """
    place = Path(folder)
    study = study or read_study(place / "study.yaml")
    if study.rates is not None:
        raise InvalidValue(
            f"The study `{study.name}` searches for learning rates, and a report does not hold the search. Copy its store instead."
        )
    outcomes = list(_outcomes(place))
    store.add(study, change=change)
    trials = {trial.key: trial for trial in study.trials()}
    done = {record.key for record in store.records(study.name) if record.state == DONE}
    own = [outcome for outcome in outcomes if outcome.key in trials]
    with store.writer(study.name) as writer:
        for outcome in (outcome for outcome in own if outcome.key not in done):
            writer.start(trials[outcome.key])
            writer.finish(outcome)
    known = sum(outcome.key in done for outcome in own)
    return Taken(study.name, len(own) - known, known, len(outcomes) - len(own))


def _outcomes(folder: Path) -> Iterator[Outcome]:
    """The results of trials that are done."""
    try:
        machines = json.loads((folder / "machines.json").read_text(encoding="utf-8"))
        places = {number: Surroundings(found["machine"], found["versions"]) for number, found in machines.items()}
        csv.field_size_limit(LONGEST)
        with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["state"] == DONE:
                    curve = tuple(json.loads(row["curve"]))
                    yield Outcome(row["key"], _numbers(row), curve, float(row["seconds"]), places[row["machine"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise InvalidValue(
            f"`{folder}` does not hold results as a report writes them: {type(cause).__name__}: {cause}. It takes `study.yaml`, "
            "`results.csv` and `machines.json` of one `deltatune study report`."
        ) from cause


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """An outcome's numbers, as they were before they became columns."""
    columns = {**{name: name for name in COLUMNS}, **RENAMED}
    found = {name: _value(name, row[column]) for name, column in columns.items()}
    return {**json.loads(row["numbers"]), **{name: value for name, value in found.items() if value is not None}}


def _value(name: str, written: str) -> Any:
    if not written:
        return None
    if name == "metric":
        return written
    if name == "degenerate":
        return written == "True"
    number = float(written)
    return int(number) if "." not in written and "e" not in written else number
