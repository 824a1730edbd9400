"""Few-shot samples and subsets: a function of the texts and the seed only, the same on every machine."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks.loading import TaskData
from deltatune.tasks.rows import Rows
from deltatune.tasks.split import rank, text_key
from deltatune.tasks.task import Task

SEEDS = (13, 21, 42, 87, 100)
"""The seeds under which few-shot results are customarily averaged."""


def k_shot(data: TaskData, shots: int = 16, seed: int = 13) -> TaskData:
    """``shots`` training rows per class, and as many other ones for validation; test stays whole.

    Both are drawn from train. Tasks without classes give ``shots`` rows in all.

    Raises:
        InvalidValue: fewer than one shot.
        DataError: a class has fewer than ``2 * shots`` rows in train.
    """
    if shots < 1:
        raise InvalidValue(f"`shots` is {shots}; it has to be at least 1.")
    task = data.task
    strata: dict[Any, list[int]] = defaultdict(list)
    for index in _order(task, data.train, seed):
        strata[data.train[task.label][index] if task.type == "classification" else None].append(index)
    for value, members in strata.items():
        if len(members) < 2 * shots:
            what = f"The class `{task.labels[value]}`" if task.type == "classification" else "The training split"
            raise DataError(
                f"{what} of `{task.name}` has {len(members)} training rows; {shots} shots and as many for validation need {2 * shots}."
            )
    train = [index for members in strata.values() for index in members[:shots]]
    validation = [index for members in strata.values() for index in members[shots : 2 * shots]]
    place = {index: position for position, index in enumerate(_order(task, data.train, seed))}
    chosen = [data.train.select(sorted(indices, key=place.__getitem__)) for indices in (train, validation)]
    return TaskData(task, chosen[0], chosen[1], data.test, data.source, (*data.notes, f"{shots} shots, seed {seed}"))


def subset(task: Task, rows: Rows, most: int, seed: int = 0) -> Rows:
    """At most ``most`` of the rows, drawn without regard to class.

    Raises:
        InvalidValue: fewer than one row is asked for.
    """
    if most < 1:
        raise InvalidValue(f"`most` is {most}; it has to be at least 1.")
    return rows if len(rows) <= most else rows.select(_order(task, rows, seed)[:most])


def _order(task: Task, rows: Rows, seed: int) -> list[int]:
    keys = [rank(f"{seed}\x1e{text_key(row, task.text)}") for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)
