"""A place deltas are pushed to and pulled from, whatever it is made of: what a hub must be able to do."""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deltatune.checkpoint.format import read
from deltatune.checkpoint.hub.entry import Entry, entry_of
from deltatune.checkpoint.hub.manifest import ID, Manifest, Parcel, check_file
from deltatune.checkpoint.record import RECORD, Record
from deltatune.errors import CheckpointError, DeltaError, InvalidValue, OutputError, UnknownName, nearest
from deltatune.registry import Registry

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MAX_RECORDS = 2**26
"""Bytes of all records of a composition."""
SHORTEST = 6
"""Digits of an id that may stand for it."""


@dataclass(frozen=True)
class Held:
    """A delta that a shelf holds.

    Attributes:
        id: hash of its files.
        name: the name it was asked for by, or what it was called.
        place: where its files lie, as the shelf reads them.
        manifest: its files.
        sizes: bytes of each, where the shelf knows them at once.
    """

    id: str
    name: str
    place: str
    manifest: Manifest
    sizes: dict[str, int]


class Shelf(ABC):
    """Where deltas are held.

    Args:
        location: as it was given.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def put(self, parcel: Parcel, card: bytes, name: str | None, overwrite: bool) -> None:
        """Take a delta in, or find that it is here already, and let the name point to it.

        Raises:
            OutputError: the name points to another delta and may not be moved, or nothing can be written.
        """

    @abstractmethod
    def find(self, wanted: str | None) -> Held:
        """The delta of that name or id.

        Raises:
            UnknownName: there is none, or several ids begin like that.
        """

    @abstractmethod
    def copy(self, held: Held, file: str, target: Path) -> None:
        """Bring one of its files to a path."""

    @abstractmethod
    def parameters(self, held: Held) -> int:
        """How many numbers its tensor files hold."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Everything it holds."""

    def describe(self, held: Held) -> Entry:
        """The facts of one delta, out of its record."""
        return entry_of(self.record(held), held.id, self.parameters(held), sum(held.sizes.values()))

    def record(self, held: Held) -> Record:
        """Its record, those of a composition's members included; no tensor is fetched."""
        names = [name for name in held.manifest.sums if name.endswith(RECORD)]
        size = sum(held.sizes.get(name, 0) for name in names)
        if size > MAX_RECORDS:
            raise CheckpointError(f"`{held.place}` has records of {size:,} bytes; {MAX_RECORDS:,} are the most. Push it again.")
        with TemporaryDirectory() as folder:
            self.bring(held, Path(folder), names)
            return read(folder)

    def bring(self, held: Held, folder: Path, names: Iterable[str]) -> None:
        """Copy files into a folder, each checked against its hash.

        Raises:
            CheckpointError: one is not what the id stands for.
            OutputError: there is no room for them.
        """
        names = list(names)
        size, room = sum(held.sizes.get(name, 0) for name in names), shutil.disk_usage(folder).free
        if size > room:
            raise OutputError(f"`{held.place}` has {size:,} bytes, and there is room for {room:,} at `{folder.parent}`. Make room.")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.copy(held, name, folder / name)
            check_file(folder / name, held.manifest.sums[name], f"{held.place}/{name}")


shelves: Registry[Callable[[str], Shelf]] = Registry("kind of hub", "hubs")
"""What makes a shelf from a location, by the protocol in front of its ``://``; all others are those of fsspec."""


def check_name(name: str) -> str:
    """A name as files and repositories can have it.

    Raises:
        InvalidValue: it is none, or looks like an id.
    """
    if not NAME.fullmatch(name) or ID.fullmatch(name):
        raise InvalidValue(f"A delta cannot be called `{name}` in a hub. Use letters, digits, `-`, `_` and `.`, and begin with a letter.")
    return name


def pick(wanted: str, ids: Iterable[str], names: Iterable[str], location: str) -> str:
    """The one id that begins with ``wanted``.

    Raises:
        UnknownName: none does, or several do.
    """
    digits = len(wanted) >= SHORTEST and set(wanted) <= set("0123456789abcdef")
    found = sorted(id for id in ids if id.startswith(wanted)) if digits else []
    if len(found) > 1:
        raise UnknownName(f"{len(found)} deltas in `{location}` have an id that begins with `{wanted}`. Give more of its digits.")
    if not found:
        names = list(names)
        hint = nearest(wanted, names) if names else "No delta there has a name yet."
        raise UnknownName(f"`{location}` has no delta `{wanted}`. {hint} `deltatune hub list` shows what there is.")
    return found[0]


def refuse_move(location: str, name: str, old: str) -> OutputError:
    """The error for a name that is taken by another delta."""
    return OutputError(
        f"`{name}` in `{location}` points to another delta already ({old[:12]}). Choose another name, or pass overwrite=True "
        "(`--overwrite`) to let it point to this one; the other stays there under its id."
    )


@contextmanager
def reached(location: str, doing: str, error: type[DeltaError] = CheckpointError) -> Iterator[None]:
    """Turn what a file system or a server says into one of our errors."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as cause:
        raise error(
            f"`{location}` could not be {doing}: {str(cause) or type(cause).__name__}. Check the location and your access."
        ) from cause
