"""Few-shot samples and subsets: a function of the texts and the seed only, the same on every machine."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks.loading import TaskData
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.split import rank, text_key
from deltatune.tasks.task import Task
from deltatune.tasks.types.mixture import PART

SEEDS = (13, 21, 42, 87, 100)
"""The seeds under which few-shot results are customarily averaged."""
PER_CLASS, UNCLASSED = 16, 32
"""Shots for each class, and in all where there are no classes."""


def k_shot(data: TaskData, shots: int | None = None, seed: int = 13) -> TaskData:
    """``shots`` training rows per class, and as many other ones for validation; test stays whole.

    Both are drawn from train. Tasks without classes give ``shots`` rows in all. Left out, it is 16 per class, and 32
    where there are none, as few-shot studies have it.

    Raises:
        InvalidValue: fewer than one shot.
        DataError: a class has fewer than ``2 * shots`` rows in train.
    """
    task = data.task
    strata: dict[Any, list[int]] = defaultdict(list)
    order = _order(task, data.train, seed)
    for index in order:
        strata[task.kind.stratum(task, data.train[index])].append(index)
    wanted = shots if shots is not None else UNCLASSED if set(strata) == {None} else PER_CLASS
    if wanted < 1:
        raise InvalidValue(f"`shots` is {wanted}; it has to be at least 1.")
    for value, members in strata.items():
        if len(members) < 2 * wanted:
            named = "" if value is None else task.kind.named(task, data.train[members[0]], task.kind.perfect(task, data.train[members[0]]))
            what = "The training split" if value is None else f"The class `{named}`"
            raise DataError(
                f"{what} of `{task.name}` has {len(members)} training rows; {wanted} shots and as many for validation need {2 * wanted}. "
                + (f"Ask for {len(members) // 2} at most." if len(members) > 1 else "Leave `shots` out.")
            )
    train = [index for members in strata.values() for index in members[:wanted]]
    validation = [index for members in strata.values() for index in members[wanted : 2 * wanted]]
    place = {index: position for position, index in enumerate(order)}
    chosen = [data.train.select(sorted(indices, key=place.__getitem__)) for indices in (train, validation)]
    return TaskData(task, chosen[0], chosen[1], data.test, data.source, (*data.notes, f"{wanted} shots, seed {seed}"))


def fewer(data: TaskData, most: int, seed: int = 13) -> TaskData:
    """At most ``most`` training rows; validation and test stay whole. More of them hold the fewer ones, under one seed.

    Raises:
        InvalidValue: fewer than one row is asked for.
    """
    train = subset(data.task, data.train, most, seed)
    notes = data.notes if train is data.train else (*data.notes, f"{most} of {len(data.train)} training rows, seed {seed}")
    return replace(data, train=train, notes=notes)


def subset(task: Task, rows: Rows, most: int, seed: int = 0) -> Rows:
    """At most ``most`` of the rows, drawn without regard to class.

    Raises:
        InvalidValue: fewer than one row is asked for.
    """
    if most < 1:
        raise InvalidValue(f"`most` is {most}; it has to be at least 1.")
    return rows if len(rows) <= most else rows.select(_order(task, rows, seed)[:most])


def varied(task: Task, rows: Rows, count: int) -> Rows:
    """A few rows from all over, of different answers as far as there are; of a mixture, of different tasks."""
    step = max(1, len(rows) // count)
    order = [*range(0, len(rows), step), *range(0, len(rows) if step > 1 else 0)]
    groups: dict[Any, list[int]] = {}
    for index in order:
        group = groups.setdefault(sort_of(task, rows[index]), [])
        if len(group) < count and index not in group:
            group.append(index)
        if len(groups) == count:
            break
    rounds = [index for place in range(count) for group in groups.values() for index in group[place : place + 1]]
    return rows.select(sorted(rounds[:count]))


def sort_of(task: Task, row: Row) -> str:
    """Of what sort a row is, where a few are to show them all: its answer; in a mixture the name of its own task."""
    return task.parts[row[PART]].name if task.parts else str(task.kind.named(task, row, task.kind.perfect(task, row)))


def _order(task: Task, rows: Rows, seed: int) -> list[int]:
    inputs = task.kind.inputs(task)
    keys = [rank(f"{seed}\x1e{text_key(row, inputs)}") for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)
