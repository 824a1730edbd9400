"""A user's own data: one CSV, JSONL or Parquet file becomes a task without a YAML file."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deltatune.errors import DataError, missing_extra, near, nearest
from deltatune.tasks.loading import TaskData, build
from deltatune.tasks.rows import Row
from deltatune.tasks.split import LEAST
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
    columns = (text,) if isinstance(text, str) else tuple(text)
    name, columns, label = _form(rows[0], type, columns, label)
    for column, keyword in (*((column, "text") for column in columns), (label, "label")):
        if column not in rows[0]:
            raise _no_column(file, column, keyword, list(rows[0]))
    kind = task_types[name]
    _check_texts(file, rows, [column for column in columns if column != label or name == "plain"])
    rows = _with_labels(file, rows, label)
    labels = _label_names(file, rows, label) if "labels" in kind.fields else ()
    if labels:
        rows = [{**row, label: str(row[label])} for row in rows]
    task = Task(
        name=file.stem,
        type=name,
        text=columns,
        label=label,
        labels=labels,
        metrics=kind.metrics,
        templates=_templates(name, columns, label, labels),
        split=Split(validation, test),
        description=f"Own data from {file.name}",
    )
    return build(task, {"train": rows}, f"file {file.name}")


def _form(row: Row, type: str | None, text: tuple[str, ...], label: str) -> tuple[str, tuple[str, ...], str]:
    """Type, text columns and label column; seen from the columns where nothing was said."""
    if type in ("plain", "conversation"):
        column = text[0] if type == "plain" or text != ("text",) else "messages"
        return type, (column,), column
    if type is not None or label in row or text != ("text",) or label != "label":
        return type or "classification", text, label
    if "messages" in row:
        return "conversation", ("messages",), "messages"
    if {"prompt", "completion"} <= row.keys():
        return "generation", ("prompt",), "completion"
    return ("plain", ("text",), "text") if row.keys() == {"text"} else ("classification", text, label)


def _templates(name: str, columns: tuple[str, ...], label: str, labels: tuple[str, ...]) -> tuple[Template, ...]:
    """Prompts as they stand where the data brings its own, and the columns' names elsewhere."""
    if task_types[name].words != "text2text":
        return ()
    return (Template("{prompt}"),) if (columns, label) == (("prompt",), "completion") else (plain_template(columns, label, labels),)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Every row of a file by column.

    Raises:
        DataError: missing, empty, of an unknown format, not UTF-8, or broken in some line.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"The data file `{file}` {what}. Give a .csv, .tsv, .jsonl or .parquet file.")
    if file.suffix not in _FORMATS:
        raise DataError(f"The data file `{file.name}` ends in `{file.suffix}`. Known: {', '.join(sorted(_FORMATS))}.")
    if file.stat().st_size == 0:
        raise DataError(f"The data file `{file.name}` is empty. It needs a header and at least {LEAST} rows of a class.")
    rows = _FORMATS[file.suffix](file)
    if not rows:
        raise DataError(f"The data file `{file.name}` has no rows. It needs at least {LEAST} of a class.")
    return rows


def _utf8(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"`{file.name}` is not UTF-8: line {line} holds the byte 0x{data[cause.start]:02x}. "
            "Save it as UTF-8, for instance: iconv -f latin1 -t utf-8 FILE > NEW"
        ) from None


def _read_csv(file: Path) -> list[dict[str, Any]]:
    lines = csv.reader(io.StringIO(_utf8(file), newline=""), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        header = next(lines, [])
        rows = []
        for cells in lines:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"`{file.name}` line {lines.line_num} has {len(cells)} cells, the header has {len(header)} ({_listed(header)}). "
                    "Put texts that hold the separator into quotes."
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as cause:
        raise DataError(f"`{file.name}` line {lines.line_num} cannot be read as CSV: {cause}.") from cause
    return rows


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_utf8(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as cause:
            raise DataError(f"`{file.name}` line {number} is not JSON: {cause.msg}. JSONL holds one object per line.") from None
        if not isinstance(row, dict):
            raise DataError(f"`{file.name}` line {number} is not a JSON object. JSONL holds one object per line.")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise missing_extra("pyarrow", "train") from cause
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"`{file.name}` cannot be read as Parquet: {cause}. Copy or write it again.") from cause
    return rows


_FORMATS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _no_column(file: Path, column: str, keyword: str, found: Sequence[str]) -> DataError:
    """What to say where the column for a keyword of ``task_from_file`` is not there."""
    hint = f" {nearest(column, found)}" if near(column, found) else ""
    return DataError(
        f"`{file.name}` has no column `{column}` for the {keyword}: its columns are {_listed(found)}.{hint} Name one by `{keyword}=COLUMN`."
    )


def _check_texts(file: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    for column in columns:
        bad = [number for number, row in enumerate(rows, 1) if not isinstance(row[column], str) or not row[column].strip()]
        if bad:
            raise DataError(f"`{file.name}` has no text in column `{column}` of {_rows(bad)}. Fill them in or take those rows out.")


def _with_labels(file: Path, rows: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    bad = [number for number, row in enumerate(rows, 1) if row[label] is None or not str(row[label]).strip()]
    if bad:
        raise DataError(f"`{file.name}` has no label in column `{label}` of {_rows(bad)}. Fill them in or take those rows out.")
    return [{**row, label: row[label].strip() if isinstance(row[label], str) else row[label]} for row in rows]


def _label_names(file: Path, rows: Sequence[Row], label: str) -> tuple[str, ...]:
    counts = Counter(str(row[label]) for row in rows)
    if len(counts) < 2:
        raise DataError(
            f"`{file.name}` has one class only, `{next(iter(counts))}`, in column `{label}`. Classification needs at least two."
        )
    if len(counts) > max(len(rows) // 2, 2):
        raise DataError(
            f"`{file.name}` has {len(counts)} different values in column `{label}` for {len(rows)} rows, so they are hardly classes. "
            "Name another column, or say `type='regression'` or `type='generation'`."
        )
    return tuple(sorted(counts, key=_numbers_first))


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        return (False, float(name), name)
    except ValueError:
        return (True, 0.0, name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _rows(numbers: Sequence[int]) -> str:
    """Names the first few of the rows, counted from 1 without the header."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} rows (rows {shown})" if len(numbers) > 1 else f"row {shown}"
