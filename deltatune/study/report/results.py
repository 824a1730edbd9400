"""Every trial of a study as one CSV, its design, and its machines: evidence that others can check, do again and go on with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.study.record import Record
from deltatune.training.files import write_text
from deltatune.training.run import written_yaml

if TYPE_CHECKING:
    from deltatune.study.store.store import Store

NAMES = (
    "backbone", "task", "category", "method", "seed", "cell", "metric", "score", "low", "high", "degenerate", "lr", "trained",
    "total", "steps", "tokens", "seconds", "training_seconds", "seconds_per_step", "peak_memory_bytes", "delta_bytes",
    "state", "attempts", "error", "machine", "key", "numbers",
)  # fmt: skip


def write_results(store: Store, name: str, folder: Path) -> Path:
    """``results.csv``, a line a trial, with the experiment in front; ``cell``, ``numbers`` and ``curve`` are JSON.

    Raises:
        OutputError: it cannot be written.
    """
    experiment, target = store.study(name).experiment, folder / "results.csv"
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("experiment", *NAMES, "curve"))
    for record in store.records(name):
        curve = json.dumps(store.curve(name, record.key))
        writer.writerow((experiment, *(_cell(record, column) for column in NAMES), curve))
    write_text(target, text.getvalue())
    return target


def write_machines(store: Store, name: str, folder: Path) -> Path:
    """``machines.json``: the machines and versions that ``machine`` numbers in ``results.csv``.

    Raises:
        OutputError: it cannot be written.
    """
    found = {str(row.id): {"machine": row.machine, "versions": row.versions} for row in store.places(name)}
    target = folder / "machines.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(found, indent=1) + "\n")
    return target


def write_design(store: Store, name: str, folder: Path) -> Path:
    """``study.yaml``, which does the study again.

    Raises:
        OutputError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "study.yaml"
    write_text(target, written_yaml(store.study(name).to_dict()))
    return target


def _cell(record: Record, name: str) -> Any:
    value = getattr(record, name)
    return json.dumps(value, sort_keys=True) if name in ("cell", "numbers") else value
