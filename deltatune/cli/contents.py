"""What files hold, whoever wrote them: ``deltatune inspect FILE|DIR``. Headers and configs are read, with limits, and no tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from deltatune.checkpoint.foreign_files import read_json
from deltatune.checkpoint.format import locate
from deltatune.checkpoint.header import Header, Stub, read_header
from deltatune.checkpoint.record import RECORD, RUN_DELTA
from deltatune.checkpoint.tensors import regular_file_size
from deltatune.cli.terminal import facts, plural, show, show_json, size, table
from deltatune.errors import CheckpointError

SAFE, CONFIG, PICKLES = ".safetensors", ".json", (".bin", ".pt", ".pth", ".ckpt")
MOST_FILES = 10_000
DEEPEST = 3
"""Levels of a delta folder of our own: `members/NAME/FILE`."""


@dataclass(frozen=True)
class Contents:
    """A file, or the files of a folder.

    Attributes:
        place: the file or the folder.
        format: whose format the folder has; empty if it is none that deltatune reads.
        headers: name of each safetensors file -> what its header says.
        configs: name of each JSON file -> its object.
        pickles: names of files that are pickles, which are not read, with their sizes.
    """

    place: Path
    format: str
    headers: dict[str, Header]
    configs: dict[str, dict[str, Any]]
    pickles: dict[str, int]


def is_native(place: Path) -> bool:
    """The folder holds a delta of our own, or is the folder of a run that does."""
    return any((place / below / RECORD).exists() for below in ("", RUN_DELTA))


def contents(place: Path) -> Contents:
    """What a file or a folder of any origin holds.

    Raises:
        CheckpointError: there is nothing, or nothing that can be shown without running code.
    """
    from deltatune.checkpoint.foreign import format_of

    if place.is_dir():
        files = {file.name: file for file in _files(place, deepest=1)}
        kind = format_of(place) or ""
    else:
        regular_file_size(place)
        files, kind = {place.name: place}, ""
    headers = {name: read_header(file) for name, file in files.items() if file.suffix == SAFE}
    configs = {name: read_json(file) for name, file in files.items() if file.suffix == CONFIG and _looks_like_config(name)}
    pickles = {name: regular_file_size(file) for name, file in files.items() if file.suffix in PICKLES}
    if not (headers or configs or pickles) and place.is_dir():
        locate(place)  # says where there are deltas
    if not (headers or configs or pickles):
        found = ", ".join(sorted(files)[:5]) or "nothing"
        raise CheckpointError(
            f"`{place}` holds no delta and no tensors that can be shown (found: {found}). Give a {SAFE} file or its folder."
        )
    return Contents(place, kind, headers, configs, pickles)


def _looks_like_config(name: str) -> bool:
    return re.search(r"(config|delta|index|head)[^/]*\.json$", name) is not None


def _files(folder: Path, deepest: int) -> Iterator[Path]:
    """Regular files of a folder and so many levels below, but for hidden ones and links.

    Raises:
        CheckpointError: they are too many: it is no folder of a delta.
    """
    count = 0
    waiting = [folder]
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            count += 1
            if count > MOST_FILES:
                raise CheckpointError(f"`{folder}` holds more than {MOST_FILES:,} files. Give the folder of one delta, or a file.")
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            if entry.is_dir() and len(entry.relative_to(folder).parts) < deepest:
                waiting.append(entry)
            elif entry.is_file():
                yield entry


def show_contents(place: Path, json: bool) -> None:
    """Print what a foreign file or folder holds.

    Raises:
        CheckpointError: see ``contents``.
    """
    found = contents(place)
    if json:
        show_json(described(found))
        return
    kind = f"a folder of {found.format}" if found.format else "a folder" if place.is_dir() else "a file of tensors"
    show(Text.assemble((str(place), "bold cyan"), "  ", (kind, "bold")))
    for name, config in found.configs.items():
        show(
            "", Text(name, style="bold"), facts(*((key, _short(value)) for key, value in config.items() if value not in (None, "", [], {})))
        )
    for name, header in found.headers.items():
        show("", Text.assemble((name, "bold"), f"  {_sizes(header)}"))
        if header.metadata:
            show(facts(*((key, _short(value)) for key, value in header.metadata.items())))
        show(tensors_table(header.tensors))
    for name, size_bytes in found.pickles.items():
        show("", Text.assemble((name, "bold"), f"  {size(size_bytes)}, a pickle: reading one can run code, so it is not shown"))


def described(found: Contents) -> dict[str, Any]:
    """The contents as JSON tells them."""
    return {
        "place": str(found.place),
        "format": found.format or None,
        "configs": found.configs,
        "files": {name: described_header(header) for name, header in found.headers.items()},
        "pickles": found.pickles,
    }


def described_header(header: Header) -> dict[str, Any]:
    """A header as JSON tells it."""
    return {
        "size_bytes": header.size_bytes,
        "metadata": dict(header.metadata),
        "tensors": [{**vars(tensor), "shape": list(tensor.shape)} for tensor in header.tensors],
    }


def native_headers(place: Path) -> dict[str, Header]:
    """The headers of a delta folder of our own, of a composition's members too, by the file's path in it."""
    return {str(file.relative_to(place)): read_header(file) for file in _files(place, DEEPEST) if file.suffix == SAFE}


def tensors_table(tensors: tuple[Stub, ...]) -> Any:
    """The tensors, those that differ only in a number folded into one line."""
    folded: dict[tuple[str, str, tuple[int, ...]], list[Stub]] = {}
    for tensor in tensors:
        folded.setdefault((re.sub(r"(?<![^.])\d+(?![^.:])", "*", tensor.name), tensor.dtype, tensor.shape), []).append(tensor)
    drawn = table("tensor", "type", "shape", "times", "bytes", right=("shape", "times", "bytes"))
    for (name, dtype, shape), group in folded.items():
        counted = sum(tensor.size_bytes for tensor in group)
        drawn.add_row(Text(name, style="cyan"), dtype, "x".join(map(str, shape)) or "scalar", str(len(group)), f"{counted:,}")
    return drawn


def _sizes(header: Header) -> str:
    return f"{size(header.size_bytes)}, {plural(len(header.tensors), 'tensor')} of {header.values_bytes:,} bytes"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
