"""What a delta folder is made of, and the id it goes by: the hash of the list of its files and their hashes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from deltatune.checkpoint.format import locate, read
from deltatune.checkpoint.record import MEMBERS, RECORD, TENSORS, Record
from deltatune.checkpoint.tensors import regular_file_size
from deltatune.errors import CheckpointError

MANIFEST = "SHA256SUMS"
MAX_MANIFEST = 2**20
ID = re.compile(r"[0-9a-f]{64}")
FILE = re.compile(rf"({MEMBERS}/[A-Za-z0-9_-]+/)?({re.escape(RECORD)}|{re.escape(TENSORS)})")
LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclass(frozen=True)
class Manifest:
    """The files of a delta folder, each with the SHA-256 of its content.

    Attributes:
        sums: name below the folder -> hash.
    """

    sums: dict[str, str]

    def to_bytes(self) -> bytes:
        """A line a file, as ``sha256sum -c`` reads them, sorted by name."""
        return "".join(f"{self.sums[name]}  {name}\n" for name in sorted(self.sums)).encode()

    @property
    def id(self) -> str:
        """What a hub knows the delta by: the SHA-256 of ``to_bytes``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True)
class Parcel:
    """A delta folder that was checked and is ready to be pushed.

    Attributes:
        folder: where its files lie.
        record: what it says about itself.
        manifest: its files.
        sizes: bytes of each.
    """

    folder: Path
    record: Record
    manifest: Manifest
    sizes: dict[str, int]


def pack(folder: Path) -> Parcel:
    """Check a delta folder, or that of a run, and sum its files up; what else lies in it stays at home.

    Raises:
        CheckpointError: there is no delta, or its files are not what its record says.
    """
    place = locate(folder)
    record = read(place)
    stored = {"": record} | {f"{MEMBERS}/{member.name}/": member for member in record.member_records}
    sums, sizes = {}, {}
    for prefix, part in stored.items():
        for name in (RECORD, TENSORS) if part.stored is not None else (RECORD,):
            path = place / prefix / name
            sizes[prefix + name] = regular_file_size(path)
            sums[prefix + name] = digest_of(path)
        if part.stored is not None and part.stored.sha256 != sums[prefix + TENSORS]:
            raise CheckpointError(
                f"`{place / prefix / TENSORS}` is truncated or was edited: it is not the file that `{RECORD}` beside it names. "
                "Save the delta again, then push it."
            )
    return Parcel(place, record, Manifest(sums), sizes)


def unpack(content: bytes, id: str, place: str) -> Manifest:
    """The manifest of a delta in a hub.

    Args:
        content: of its ``SHA256SUMS``.
        id: what it shall be.
        place: where it was read, for errors.

    Raises:
        CheckpointError: it is another one, or names files that a delta folder does not have.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != id:
        raise CheckpointError(
            f"`{place}` was edited or is truncated: its SHA-256 is {found[:16]}..., and the delta goes by {id[:16]}.... Push it again."
        )
    lines = [LINE.fullmatch(line) for line in content.decode("utf-8", "replace").splitlines()]
    sums = {line[2]: line[1] for line in lines if line is not None and FILE.fullmatch(line[2])}
    if len(sums) != len(lines) or RECORD not in sums:
        raise CheckpointError(f"`{place}` does not list the files of a delta, so nothing is read from there. Push the delta again.")
    return Manifest(sums)


def check_file(path: Path, sha256: str, place: str) -> None:
    """A fetched file is the one the manifest names.

    Raises:
        CheckpointError: it is another one.
    """
    found = digest_of(path)
    if found != sha256:
        raise CheckpointError(
            f"`{place}` was edited or is truncated: its SHA-256 is {found[:16]}..., and the id stands for {sha256[:16]}.... "
            "Nothing was kept of it. Push the delta again, or pull another one."
        )


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
