"""A hub for deltas, on any file system or on the Hugging Face Hub: content-addressed, verified, searchable, no server.

The id of a delta is the SHA-256 over the names and hashes of its files, so what is pulled is what was pushed. A name points
to an id and may be moved to a newer one; the older stays. Whatever is listed is made from the deltas' own records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from deltatune.checkpoint.fingerprint import Fingerprint
from deltatune.checkpoint.folder import place_of, replacing
from deltatune.checkpoint.foreign import replaced_files
from deltatune.checkpoint.format import read
from deltatune.checkpoint.hub.card import card as card
from deltatune.checkpoint.hub.entry import Entry as Entry
from deltatune.checkpoint.hub.entry import Query, count_values
from deltatune.checkpoint.hub.filesystem import FolderShelf
from deltatune.checkpoint.hub.huggingface import RepositoryShelf as RepositoryShelf
from deltatune.checkpoint.hub.manifest import Parcel, pack
from deltatune.checkpoint.hub.shelf import Shelf, shelves
from deltatune.checkpoint.record import TENSORS

__all__ = ["Entry", "card", "entries", "pull", "push", "search", "show"]

PROTOCOL = re.compile(r"([a-z0-9+]+)://.*", re.DOTALL)
HERE = ("file", "local")


def push(
    folder: str | os.PathLike[str],
    location: str | os.PathLike[str],
    name: str | None = None,
    *,
    overwrite: bool = False,
    licence: str = "",
) -> str:
    """Bring a saved delta to a hub; again, if you like: what is there already is not sent twice.

    Args:
        folder: what ``dt.save`` or a run wrote. Only the delta's own files leave it.
        location: a folder, a URL that fsspec knows (``s3://bucket/deltas``, ``memory://``), or ``hf://owner/name``.
        name: what shall point to it there; none if left out.
        overwrite: move a name that points to another delta; that one stays under its id.
        licence: of the backbone, for the card.

    Returns:
        The id: the hash of its files.

    Raises:
        CheckpointError: the folder holds no whole delta.
        OutputError: the name is taken, or the hub cannot be written. No one sees a part of a delta.
        InvalidValue: no such kind of place, or a name that is none.

    Example:
        >>> push("runs/bbc", "hub", "bbc-lora")  # doctest: +SKIP
    """
    parcel = pack(Path(folder))
    shelf = shelf_at(location)
    text = card(
        parcel.record,
        parcel.manifest.id,
        parameters=_parameters(parcel),
        size_bytes=sum(parcel.sizes.values()),
        source=_public(shelf.location),
        name=name,
        licence=licence,
    )
    shelf.put(parcel, text.encode(), name, overwrite)
    return parcel.manifest.id


def pull(
    location: str | os.PathLike[str],
    wanted: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Bring a delta from a hub, every file checked against the hash its id stands for.

    Args:
        location: as in ``push``.
        wanted: a name, an id, or the first digits of one; may be left out for ``hf://owner/name``.
        folder: where to; called as ``wanted`` if left out.
        overwrite: replace the delta that the folder holds.

    Returns:
        The folder, ready for ``dt.open`` and ``dt.load``.

    Raises:
        UnknownName: there is no such delta.
        CheckpointError: a file is not what the id stands for; nothing is kept of it.
        OutputError: the folder is not empty, or cannot be written.

    Example:
        >>> dt.open(pull("hub", "bbc-lora", "bbc"))  # doctest: +SKIP
    """
    shelf = shelf_at(location)
    held = shelf.find(wanted)
    target = place_of(folder if folder is not None else held.name)
    with replacing(target, overwrite=overwrite, ours=replaced_files()) as fresh:
        shelf.bring(held, fresh, held.manifest.sums)
        read(fresh)
    return target


def entries(location: str | os.PathLike[str]) -> list[Entry]:
    """Every delta of a hub, those with names first.

    Raises:
        CheckpointError: the hub cannot be read.
    """
    return shelf_at(location).entries()


def show(location: str | os.PathLike[str], wanted: str | None = None) -> tuple[Entry, str]:
    """The facts of one delta, and its card.

    Raises:
        UnknownName: there is no such delta.
        CheckpointError: its record is not what the id stands for.
    """
    shelf = shelf_at(location)
    held = shelf.find(wanted)
    found = shelf.describe(held)
    name = held.name if held.name != held.id and not held.id.startswith(held.name) else None
    text = card(
        shelf.record(held),
        held.id,
        parameters=found.parameters,
        size_bytes=found.size_bytes,
        source=_public(shelf.location),
        name=name,
    )
    return found, text


def search(
    location: str | os.PathLike[str],
    *,
    backbone: str | Collection[str] | None = None,
    fingerprint: str | Fingerprint | None = None,
    task: str | None = None,
    method: str | None = None,
    metric: str | None = None,
    min_score: float | None = None,
) -> list[Entry]:
    """The deltas of a hub that have all that is asked for, the best score first.

    Args:
        location: as in ``push``.
        backbone: its id, or several that mean the same.
        fingerprint: ``dt.checkpoint.fingerprint(backbone)``, or its digests as listings show them, or the first digits of one.
        task: name of the task.
        method: of the delta, or of a member of a composition.
        metric: that counts; scores of different metrics do not compare.
        min_score: lowest score.
    """
    digests = f"{fingerprint.structure}-{fingerprint.weights}" if isinstance(fingerprint, Fingerprint) else fingerprint
    query = Query(backbone, digests, task, method, metric, min_score)
    return sorted(filter(query.fits, entries(location)), key=lambda entry: (entry.score is None, -(entry.score or 0.0)))


def shelf_at(location: str | os.PathLike[str]) -> Shelf:
    """What holds the deltas of a location.

    Raises:
        InvalidValue: no such kind of place.
    """
    place = os.fspath(location)
    protocol = PROTOCOL.fullmatch(place)
    return shelves[protocol[1]](place) if protocol and protocol[1] in shelves else FolderShelf(place)


def _parameters(parcel: Parcel) -> int:
    """Numbers in the tensor files of a folder."""
    return sum(_values(parcel.folder / name) for name in parcel.manifest.sums if name.endswith(TENSORS))


def _values(file: Path) -> int:
    with file.open("rb") as opened:

        def part(start: int, end: int) -> bytes:
            opened.seek(start)
            return opened.read(end - start)

        return count_values(part, str(file))


def _public(location: str) -> str:
    """The location as a card may say it: a folder of somebody's machine is nobody else's business."""
    protocol = PROTOCOL.fullmatch(location)
    return location if protocol and protocol[1] not in HERE else "HUB"
