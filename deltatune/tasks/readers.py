"""Rows of a user's own file one by one: CSV, JSONL or Parquet, with an error that names the line where one cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from deltatune.errors import DataError, missing_extra
from deltatune.tasks.split import LEAST

BATCH = 1000


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Every row of a file by column; what a line of JSONL leaves out is None.

    Raises:
        DataError: missing, empty, of an unknown format, not UTF-8, or broken in some line.
    """
    rows = list(iterate(file))
    names = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(names) else {name: row.get(name) for name in names} for row in rows]


def iterate(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file one after the other, without all of them in memory.

    Raises:
        DataError: as ``read_rows``.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"The data file `{file}` {what}. Give a .csv, .tsv, .jsonl or .parquet file.")
    if file.suffix not in _FORMATS:
        raise DataError(f"The data file `{file.name}` ends in `{file.suffix}`. Known: {', '.join(sorted(_FORMATS))}.")
    if file.stat().st_size == 0:
        raise DataError(f"The data file `{file.name}` is empty. It needs a header and at least {LEAST} rows of a class.")
    empty = True
    for row in _FORMATS[file.suffix](file):
        empty = False
        yield row
    if empty:
        raise DataError(f"The data file `{file.name}` has no rows. It needs at least {LEAST} of a class.")


def listed(names: Iterable[str]) -> str:
    """Names of columns, for errors."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except UnicodeDecodeError:
        raise _not_utf8(file) from None


def _not_utf8(file: Path) -> DataError:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as cause:
                return DataError(
                    f"`{file.name}` is not UTF-8: line {number} holds the byte 0x{line[cause.start]:02x}. "
                    "Save it as UTF-8, for instance: iconv -f latin1 -t utf-8 FILE > NEW"
                )
    return DataError(f"`{file.name}` changed while it was read. Read it again.")


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    lines = csv.reader(_lines(file), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        header = next(lines, [])
        for cells in lines:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"`{file.name}` line {lines.line_num} has {len(cells)} cells, the header has {len(header)} ({listed(header)}). "
                    "Put texts that hold the separator into quotes."
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as cause:
        raise DataError(f"`{file.name}` line {lines.line_num} cannot be read as CSV: {cause}.") from cause


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as cause:
            raise DataError(f"`{file.name}` line {number} is not JSON: {cause.msg}. JSONL holds one object per line.") from None
        if not isinstance(row, dict):
            raise DataError(f"`{file.name}` line {number} is not a JSON object. JSONL holds one object per line.")
        yield row


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise missing_extra("pyarrow", "train") from cause
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"`{file.name}` cannot be read as Parquet: {cause}. Copy or write it again.") from cause


_FORMATS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
