"""Rows of a large task one after the other, never all in memory: from the mirror's files, or from the hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks.loading import encode_rows, nowhere
from deltatune.tasks.rows import Row
from deltatune.tasks.sources import mirror_file, mirror_names, stream_hub
from deltatune.tasks.task import SPLITS, Task, get_task, mirrored

BATCH = 1000


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
    if task.split is not None:
        raise DataError(f"The splits of `{task.name}` are cut from all of its rows, so it cannot be streamed. Load it: load_task(...).")
    rows = _encoded(task, split)
    return rows if shuffle < 2 else shuffled(rows, shuffle, seed)


def _encoded(task: Task, split: str) -> Iterator[Row]:
    location = task.hub.location if task.hub else mirrored(task.mirror)
    if location is not None:
        source, names = mirror_file(task, location / f"{split}.parquet"), mirror_names(location)
    elif task.hub is not None:
        source, names = stream_hub(task, task.hub, split)
    else:
        raise nowhere(task)
    while batch := list(islice(source, BATCH)):
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
