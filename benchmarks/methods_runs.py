"""The runs behind ``docs/methods.md``: what they were asked for, where they lie, and which of them are of another time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.methods import methods
from deltatune.methods.fields import as_written
from deltatune.methods.kinds import Method
from deltatune.methods.making import settings_of

BACKBONE = "minilm"
TASKS = ("bbc-news", "tweet-sentiment")
STEPS, BATCH, LENGTH, SEEDS = 200, 16, 32, (13, 21, 42)
"""The budget of every run; ``LENGTH`` is the most tokens of a text."""

RESULTS = Path(__file__).parent / "results" / "methods"
REQUIRED: dict[str, Any] = {"token_ids": tuple(range(1996, 3996))}
"""Values of fields that have no default: the two thousand commonest whole words of BERT's vocabulary."""

Run = Mapping[str, Any]


def recipe(name: str) -> Method:
    """The method with its defaults."""
    needed = {field.name for field in dataclasses.fields(methods[name])} & REQUIRED.keys()
    return methods[name](**{field: REQUIRED[field] for field in needed})


def asked(name: str) -> dict[str, Any]:
    """The learning rate and the fields that a run of today would have; what only this benchmark sets is left out."""
    fields = {field: as_written(value) for field, value in settings_of(recipe(name)).items() if field not in REQUIRED}
    return {"lr": methods[name].learning_rate, "fields": fields}


def is_stale(run: Run) -> bool:
    """The run had another rate or other fields than today's defaults, or does not say what it had."""
    return {"lr": run.get("lr"), "fields": run.get("fields")} != asked(run["method"])


def lines(file: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def runs_of(task: str, results: Path = RESULTS) -> dict[str, list[Run]]:
    """Method -> its runs by seed; where one was done twice, the later counts."""
    found: dict[str, dict[int, Run]] = {}
    for run in lines(results / f"{task}.jsonl"):
        found.setdefault(run["method"], {})[run["seed"]] = run
    return {name: [by[seed] for seed in sorted(by)] for name, by in found.items()}


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """One of the files beside the runs, ``cost`` or ``ground``; empty where it is not there yet."""
    file = results / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def is_complete(results: Path = RESULTS) -> bool:
    """Every method has a run of today's defaults with every seed on every task, and a cost if it trains."""
    timed = read("cost", results).get("rows", {})
    by_task = {task: runs_of(task, results) for task in TASKS}
    done = all(
        {run["seed"] for run in by_task[task].get(name, []) if not is_stale(run)} >= set(SEEDS) for name in methods for task in TASKS
    )
    return done and all(name in timed for name in methods if methods[name].trains)


def collapsed(run: Run, labels: str) -> bool:
    """It gave every test row the same answer.

    A run that did not note how many answers it gave is told by its marks: right on all rows of one label, and on no other.

    Args:
        run: with ``answers``, or with ``right``, a character a test row.
        labels: the truth, a character a test row.
    """
    if "answers" in run:
        return bool(run["answers"] == 1)
    return any(run["right"] == "".join(str(int(label == one)) for label in labels) for one in set(labels))
