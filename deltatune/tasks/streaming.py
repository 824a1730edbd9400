"""Rows of a large task one after the other, never all in memory: from the mirror's files, from the hub, or from a file of one's own."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from deltatune.errors import DataError, InvalidValue, Noticed
from deltatune.tasks.files import file_stream
from deltatune.tasks.loading import TaskData, encode_rows, nowhere
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.sources import mirror_file, mirror_names, stream_hub
from deltatune.tasks.split import overlap, rank, text_key
from deltatune.tasks.task import SPLITS, Task, get_task, mirrored

BATCH = 1000
HELD = 1000
"""Rows that are held back from train for a split that the source lacks, where nothing says how many."""
SHARES = {"validation": (0.0, 0.1), "test": (0.1, 0.3)}
"""Between which shares of all hashes those of a split lie that is held back."""
SAMPLE = 1000
"""Training rows that are kept, for the fingerprint and for what is to be known ahead."""
SHUFFLED = 10_000
"""Rows from which the next training row is drawn."""

Source = Callable[[str], Iterator[Row] | None]
"""Split -> its encoded rows, from the first on; None where the source has no such split."""


def stream_task(name: str | Task, split: str = "train", *, shuffle: int = 0, seed: int = 0) -> Iterator[Row]:
    """The encoded rows of one split as the source has them; nothing is deduplicated or cut, which would need all of them.

    >>> from itertools import islice
    >>> rows = stream_task("glue-sst2")  # doctest: +SKIP
    >>> len(list(islice(rows, 100)))  # doctest: +SKIP
    100

    Args:
        name: of a task with splits of its own, in a mirror or on the hub.
        split: train, validation or test.
        shuffle: rows held back, of which each next one is drawn; 0 keeps the order.
        seed: of the draw.

    Raises:
        UnknownName: no task has this name.
        InvalidValue: a split of another name.
        MissingExtra: neither a mirror nor the hub has the task.
        DataError: the task's splits are cut by us, or a row does not hold what the task says.
    """
    task = get_task(name) if isinstance(name, str) else name
    if split not in SPLITS:
        raise InvalidValue(f"The split `{split}` was asked for; there are {', '.join(SPLITS)}.")
    check_streams(task)
    rows = source_of(task)(split)
    if rows is None:
        raise DataError(f"`{task.name}` has no split `{split}` at its source: it would be cut from train. Load it whole.")
    return rows if shuffle < 2 else shuffled(rows, shuffle, seed)


def check_streams(task: Task) -> None:
    """Make sure that the task's rows can come one after the other.

    Raises:
        DataError: its splits are cut by us.
    """
    if task.split is not None:
        raise DataError(f"The splits of `{task.name}` are cut from all of its rows, so it cannot be streamed. Load it whole.")


def stream_data(name: str | Task, *, validation: int = 0, test: int = 0, seed: int = 0) -> TaskData:
    """A task whose training rows come one after the other: ``train`` has the first ones only, ``stream`` gives all of them.

    A split that the source lacks is held back from train, as many rows as are asked for, by the hashes of their texts. No text of
    the validation and the test rows is trained on. Duplicates within train stay.

    Args:
        name: of a task with splits of its own, in a mirror or on the hub.
        validation: rows to choose by; 0 takes the source's whole split, or holds back ``HELD``.
        test: rows to report on; the same.
        seed: of the order of the training rows.

    Raises:
        UnknownName: no task has this name.
        MissingExtra: neither a mirror nor the hub has the task.
        DataError: the task's splits are cut by us, a row does not hold what the task says, or a split stays empty.
    """
    task = get_task(name) if isinstance(name, str) else name
    check_streams(task)
    named = f"{task.hub.id} ({task.hub.config})" if task.hub else task.mirror
    place = f"mirror of {named}" if _mirrored(task) or not task.hub else f"hub {named}"
    return streamed(task, source_of(task), {"validation": validation, "test": test}, seed, place)


def stream_file(path: str | os.PathLike[str], *, validation: int = 0, test: int = 0, seed: int = 0, **columns: Any) -> TaskData:
    """The same of a user's own file, of which validation and test are held back; ``columns`` as ``task_from_file`` takes them.

    Raises:
        DataError: as ``task_from_file``.
    """
    task, rows = file_stream(path, **columns)

    def source(split: str) -> Iterator[Row] | None:
        return _encoded(task, rows()) if split == "train" else None

    return streamed(task, source, {"validation": validation, "test": test}, seed, f"file {Path(path).name}")


def streamed(task: Task, source: Source, wanted: dict[str, int], seed: int, place: str) -> TaskData:
    """A source's rows as a streamed task; see ``stream_data``."""
    given = {name: list(islice(source(name) or (), wanted[name] or None)) for name in wanted}
    notes = []
    if given["validation"] and not given["test"]:  # as ``load_task`` has it
        given["test"] = list(islice(source("validation") or (), wanted["test"] or None))
        given["validation"] = []
        notes.append("the source has no labelled test split: its validation is used")
    lacking = {name: wanted[name] or HELD for name in given if not given[name]}
    given |= _held_back(task, source, lacking)
    notes += [f"{len(given[name])} rows of {name} are held back from train" for name in lacking]
    inputs = task.kind.inputs(task)
    if twice := overlap({"train": [], **given}, inputs)["test"]:
        notes.append(f"{twice} rows of test have a text of validation")
        warnings.warn(f"`{task.name}`: {notes[-1]}, so scores on test say less than they seem to.", Noticed, stacklevel=3)
    held = {text_key(row, inputs) for rows in given.values() for row in rows}

    def stream(number: int) -> Iterator[Row]:
        rows = shuffled(_rows(source, task), SHUFFLED, seed * 1_000_003 + number)
        return (row for row in rows if text_key(row, inputs) not in held)

    given["train"] = list(islice((row for row in _rows(source, task) if text_key(row, inputs) not in held), SAMPLE))
    for name in SPLITS:
        if not given[name]:
            raise DataError(f"The split `{name}` of `{task.name}` is empty when it is streamed. Load it whole, or add rows.")
    columns = task.kind.columns(task)
    train, choosing, testing = (Rows.of(given[name], columns) for name in SPLITS)
    return TaskData(task, train, choosing, testing, f"{place}, streamed", tuple(notes), stream)


def _held_back(task: Task, source: Source, lacking: Mapping[str, int]) -> dict[str, list[Row]]:
    """The first training rows whose texts' hashes lie in a split's share, as many of each split as are wanted."""
    found: dict[str, list[Row]] = {name: [] for name in lacking}
    inputs = task.kind.inputs(task)
    for row in _rows(source, task) if lacking else ():
        number = int(rank(text_key(row, inputs))[:8], 16) / 2**32
        for name, count in lacking.items():
            low, high = SHARES[name]
            if low <= number < high and len(found[name]) < count:
                found[name].append(row)
        if all(len(found[name]) == count for name, count in lacking.items()):
            break
    return found


def _rows(source: Source, task: Task) -> Iterator[Row]:
    rows = source("train")
    if rows is None:
        raise DataError(f"The source of `{task.name}` has no split `train`.")
    return rows


def source_of(task: Task) -> Source:
    """Where a task's rows stream from: its mirror, else the hub.

    Raises:
        DeltaError: it is at neither, once it is asked.
    """

    def rows(split: str) -> Iterator[Row] | None:
        location = _mirrored(task)
        if location is not None:
            file = location / f"{split}.parquet"
            return _encoded(task, mirror_file(task, file), mirror_names(location)) if file.is_file() else None
        if task.hub is None:
            raise nowhere(task)
        found = stream_hub(task, task.hub, split)
        return None if found is None else _encoded(task, *found)

    return rows


def _mirrored(task: Task) -> Path | None:
    return task.hub.location if task.hub else mirrored(task.mirror)


def _encoded(task: Task, rows: Iterator[Row], names: tuple[str, ...] = ()) -> Iterator[Row]:
    while batch := list(islice(rows, BATCH)):
        yield from encode_rows(task, batch, names)


def shuffled(rows: Iterable[Any], size: int, seed: int) -> Iterator[Any]:
    """Rows drawn at random from the next ``size`` ones.

    >>> sorted(shuffled(range(10), 4, 0)) == list(range(10)) != list(shuffled(range(10), 4, 0))
    True
    """
    draw = random.Random(seed)
    held: list[Any] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = draw.randrange(size)
        yield held[place]
        held[place] = row
    draw.shuffle(held)
    yield from held
