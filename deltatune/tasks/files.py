"""A user's own data: one CSV, JSONL or Parquet file becomes a task without a YAML file."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from deltatune.errors import DataError, Noticed, near, nearest
from deltatune.tasks.loading import TaskData, build
from deltatune.tasks.readers import BATCH, iterate, listed, read_rows
from deltatune.tasks.rows import Row
from deltatune.tasks.task import Split, Task
from deltatune.tasks.template import Template, plain_template
from deltatune.tasks.types import task_types


def task_from_file(
    path: str | os.PathLike[str],
    *,
    text: str | Sequence[str] = "text",
    label: str = "label",
    type: str | None = None,
    validation: float = 0.1,
    test: float = 0.2,
) -> TaskData:
    """A task from a file with a header (CSV), one JSON object a line (JSONL), or Parquet.

    Duplicates are left out and the rest is cut by the texts' hashes, class by class, as for built-in tasks. The labels
    are the distinct values of the label column in alphabetical order, numbers in theirs. Where the type is left out, it is
    seen from the columns: with a label a classification, ``messages`` are chats, ``prompt`` and ``completion`` a generation,
    and texts alone are plain texts.

    Args:
        path: the file; its ending says the format.
        text: the text column, or two columns for pairs.
        label: the label column.
        type: what the label is: a class, a number (regression), a text to generate (generation), ...
        validation: share of the rows to choose by.
        test: share of the rows to report on.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or lacks a column; a row lacks text or label; there is one class only.
    """
    file = Path(path).expanduser()
    rows = read_rows(file)
    form = _form(file, rows[0], text, label, type)
    rows = _sound(file, form, rows)
    task = _task(file, form, rows, Split(validation, test))
    data = build(task, {"train": list(_named(task, rows))}, f"file {file.name}")
    if data.notes:
        told = f"`{file.name}`: {', '.join(data.notes)}. A text counts once, and where its labels differ not at all."
        warnings.warn(told, Noticed, stacklevel=2)
    return data


def file_stream(
    path: str | os.PathLike[str], *, text: str | Sequence[str] = "text", label: str = "label", type: str | None = None
) -> tuple[Task, Callable[[], Iterator[Row]]]:
    """A file as a task, and what gives its rows from the first on, never all in memory; once they are read through for the labels.

    Raises:
        DataError: as ``task_from_file``; bad rows are named as they are met.
    """
    file = Path(path).expanduser()
    form = _form(file, next(iterate(file)), text, label, type)

    def rows() -> Iterator[Row]:
        source, count = iterate(file), 0
        while batch := list(islice(source, BATCH)):
            yield from _sound(file, form, [{column: row.get(column) for column in form.columns} for row in batch], count)
            count += len(batch)

    task = _task(file, form, rows(), None)
    return task, lambda: iter(_named(task, rows()))


class Form(NamedTuple):
    """How a file is read.

    Attributes:
        type: the task type.
        text: the text columns.
        label: the label column.
    """

    type: str
    text: tuple[str, ...]
    label: str

    @property
    def columns(self) -> tuple[str, ...]:
        """All that is read."""
        return tuple(dict.fromkeys((*self.text, self.label)))


def _form(file: Path, row: Row, text: str | Sequence[str], label: str, type: str | None) -> Form:
    form = _seen(row, type, (text,) if isinstance(text, str) else tuple(text), label)
    for column, keyword in (*((column, "text") for column in form.text), (form.label, "label")):
        if column not in row:
            raise _no_column(file, column, keyword, list(row))
    return form


def _seen(row: Row, type: str | None, text: tuple[str, ...], label: str) -> Form:
    """Type, text columns and label column; seen from the columns where nothing was said."""
    if type in ("plain", "conversation"):
        column = text[0] if type == "plain" or text != ("text",) else "messages"
        return Form(type, (column,), column)
    if type is not None or label in row or text != ("text",) or label != "label":
        return Form(type or "classification", text, label)
    if "messages" in row:
        return Form("conversation", ("messages",), "messages")
    if {"prompt", "completion"} <= row.keys():
        return Form("generation", ("prompt",), "completion")
    return Form("plain", ("text",), "text") if row.keys() == {"text"} else Form("classification", text, label)


def _task(file: Path, form: Form, rows: Iterable[Row], split: Split | None) -> Task:
    kind = task_types[form.type]
    labels = _label_names(file, rows, form.label) if "labels" in kind.fields else ()
    return Task(
        name=file.stem,
        type=form.type,
        text=form.text,
        label=form.label,
        labels=labels,
        metrics=kind.metrics,
        templates=_templates(form.type, form.text, form.label, labels),
        split=split,
        description=f"Own data from {file.name}",
    )


def _named(task: Task, rows: Iterable[Row]) -> Iterable[Row]:
    """Labels as the texts that name them."""
    return ({**row, task.label: str(row[task.label])} for row in rows) if task.labels else rows


def _sound(file: Path, form: Form, rows: Sequence[Row], before: int = 0) -> list[dict[str, Any]]:
    """Rows that have their texts and labels; there are ``before`` others in front of them."""
    for column in form.text:
        if column != form.label or form.type == "plain":
            _check_texts(file, rows, column, before)
    return _with_labels(file, rows, form.label, before)


def _templates(name: str, columns: tuple[str, ...], label: str, labels: tuple[str, ...]) -> tuple[Template, ...]:
    """Prompts as they stand where the data brings its own, and the columns' names elsewhere."""
    if task_types[name].words != "text2text":
        return ()
    return (Template("{prompt}"),) if (columns, label) == (("prompt",), "completion") else (plain_template(columns, label, labels),)


def _no_column(file: Path, column: str, keyword: str, found: Sequence[str]) -> DataError:
    """What to say where the column for a keyword of ``task_from_file`` is not there."""
    hint = f" {nearest(column, found)}" if near(column, found) else ""
    return DataError(
        f"`{file.name}` has no column `{column}` for the {keyword}: its columns are {listed(found)}.{hint} Name one by `{keyword}=COLUMN`."
    )


def _check_texts(file: Path, rows: Sequence[Row], column: str, before: int) -> None:
    bad = [number for number, row in enumerate(rows, before + 1) if not isinstance(row[column], str) or not row[column].strip()]
    if bad:
        raise DataError(f"`{file.name}` has no text in column `{column}` of {_rows(bad)}. Fill them in or take those rows out.")


def _with_labels(file: Path, rows: Sequence[Row], label: str, before: int) -> list[dict[str, Any]]:
    bad = [number for number, row in enumerate(rows, before + 1) if row[label] is None or not str(row[label]).strip()]
    if bad:
        raise DataError(f"`{file.name}` has no label in column `{label}` of {_rows(bad)}. Fill them in or take those rows out.")
    return [{**row, label: row[label].strip() if isinstance(row[label], str) else row[label]} for row in rows]


def _label_names(file: Path, rows: Iterable[Row], label: str) -> tuple[str, ...]:
    counts = Counter(str(row[label]) for row in rows)
    if len(counts) < 2:
        raise DataError(
            f"`{file.name}` has one class only, `{next(iter(counts))}`, in column `{label}`. Classification needs at least two."
        )
    if len(counts) > max(counts.total() // 2, 2):
        raise DataError(
            f"`{file.name}` has {len(counts)} different values in column `{label}` for {counts.total()} rows, so they are hardly classes. "
            "Name another column, or say `type='regression'` or `type='generation'`."
        )
    return tuple(sorted(counts, key=_numbers_first))


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        return (False, float(name), name)
    except ValueError:
        return (True, 0.0, name)


def _rows(numbers: Sequence[int]) -> str:
    """Names the first few of the rows, counted from 1 without the header."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} rows (rows {shown})" if len(numbers) > 1 else f"row {shown}"
