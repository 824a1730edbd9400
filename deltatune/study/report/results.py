"""Every trial of a study as one CSV, and its design: evidence that others can check and do again."""

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
    "state", "attempts", "error", "key", "numbers",
)  # fmt: skip


def write_results(store: Store, name: str, folder: Path) -> Path:
    """``results.csv``, a line a trial, with the experiment in front; ``cell`` and ``numbers`` are JSON.

    Raises:
        OutputError: it cannot be written.
    """
    experiment, target = store.study(name).experiment, folder / "results.csv"
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("experiment", *NAMES))
    for record in store.records(name):
        writer.writerow((experiment, *(_cell(record, column) for column in NAMES)))
    write_text(target, text.getvalue())
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
