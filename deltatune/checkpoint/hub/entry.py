"""What a hub lists of a delta: a few facts out of its record, enough to find it by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.checkpoint.header import described
from deltatune.checkpoint.hub.manifest import ID
from deltatune.checkpoint.record import Record
from deltatune.checkpoint.tensors import MAX_HEADER
from deltatune.errors import CheckpointError

MIXED = "composition"
MAX_LETTERS = 2000
"""Of a text that is listed."""


@dataclass(frozen=True)
class Entry:
    """One delta of a hub.

    Attributes:
        id: hash of its files.
        names: what points to it there.
        name: what it was called when it was saved.
        method: of the delta; ``composition`` for several.
        methods: of the delta, or of the members of a composition.
        fields: of the method.
        backbone: id of the backbone; None if the record does not name it.
        backbone_class: its class.
        fingerprint: digests of the backbone's structure and weights, ``<structure>-<weights>``.
        task: name of the task.
        metric: that counts.
        score: its value.
        parameters: how many numbers its tensor files hold.
        size_bytes: of its files.
    """

    id: str
    names: tuple[str, ...]
    name: str
    method: str
    methods: tuple[str, ...]
    fields: dict[str, Any]
    backbone: str | None
    backbone_class: str
    fingerprint: str
    task: str | None
    metric: str | None
    score: float | None
    parameters: int
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As an index holds it and ``--json`` prints it."""
        return dataclasses.asdict(self)


def entry_of(record: Record, id: str, parameters: int, size_bytes: int) -> Entry:
    """The facts of one record, in letters that can be shown."""
    facts = vars(_facts(record, id, parameters, size_bytes))
    return Entry(**{**_shown(facts), "names": (), "methods": tuple(_shown(facts["methods"]))})


def _facts(record: Record, id: str, parameters: int, size_bytes: int) -> Entry:
    parts = record.member_records or (record,)
    seen = record.origin.fingerprint
    return Entry(
        id=id,
        names=(),
        name=record.name,
        method=record.method or MIXED,
        methods=tuple(sorted({part.method or MIXED for part in parts})),
        fields=record.fields,
        backbone=record.origin.id,
        backbone_class=seen.class_name,
        fingerprint=f"{seen.structure}-{seen.weights}",
        task=record.about.task,
        metric=record.about.metric,
        score=record.about.score,
        parameters=parameters,
        size_bytes=size_bytes,
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "name": (str,),
    "method": (str,),
    "methods": (list,),
    "fields": (dict,),
    "backbone": (str, type(None)),
    "backbone_class": (str,),
    "fingerprint": (str,),
    "task": (str, type(None)),
    "metric": (str, type(None)),
    "score": (int, float, type(None)),
    "parameters": (int,),
    "size_bytes": (int,),
}


def entry_from(data: object) -> Entry | None:
    """What ``to_json`` gave; None for anything else, which an index is made anew for."""
    if not isinstance(data, dict) or any(type(data.get(key)) not in types for key, types in _TYPES.items() if key in data):
        return None
    if data.keys() - {"names"} != _TYPES.keys() or not all(isinstance(name, str) for name in data["methods"]):
        return None
    if not ID.fullmatch(data["id"]) or min(data["parameters"], data["size_bytes"]) < 0 or _shown(data) != data:
        return None
    return Entry(**{**data, "names": (), "methods": tuple(data["methods"])})


@dataclass(frozen=True)
class Query:
    """What is searched for; a field left out lets everything pass.

    Attributes:
        backbone: id of the backbone, or several that mean the same.
        fingerprint: ``<structure>-<weights>``, one of the two, or the beginning of one.
        task: name of the task.
        method: of the delta, or of a member of a composition.
        metric: that counts.
        min_score: lowest score.
    """

    backbone: str | Collection[str] | None = None
    fingerprint: str | None = None
    task: str | None = None
    method: str | None = None
    metric: str | None = None
    min_score: float | None = None

    def fits(self, entry: Entry) -> bool:
        """The entry has all that is asked for."""
        backbones = {self.backbone} if isinstance(self.backbone, str) else self.backbone
        digests = (entry.fingerprint, *entry.fingerprint.split("-"))
        return (
            (backbones is None or entry.backbone in backbones)
            and (self.fingerprint is None or any(digest.startswith(self.fingerprint) for digest in digests))
            and self.task in (None, entry.task)
            and (self.method is None or self.method in (entry.method, *entry.methods))
            and self.metric in (None, entry.metric)
            and (self.min_score is None or (entry.score is not None and entry.score >= self.min_score))
        )


def _shown(value: Any) -> Any:
    """The value as JSON has it, with nothing in its texts that could steer a terminal or is no text at all, and no text without end."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value[:MAX_LETTERS])
    if isinstance(value, dict):
        return {_shown(key): _shown(inner) for key, inner in value.items()}
    return [_shown(inner) for inner in value] if isinstance(value, list | tuple) else value


def count_values(read: Callable[[int, int], bytes], place: str) -> int:
    """How many numbers a safetensors file holds; its header alone is read.

    Args:
        read: gives the bytes from a start to an end.
        place: where the file is, for errors.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    length = int.from_bytes(read(0, 8), "little")
    try:
        if length > MAX_HEADER:
            raise ValueError(f"it claims {length:,} bytes for its header, of which {MAX_HEADER:,} are the most")
        tensors, _ = described(read(8, 8 + length), room=2**63)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"`{place}` is no safetensors file: {cause}. Push the delta again.") from cause
    return sum(math.prod(tensor.shape) for tensor in tensors)


def named_entries(entries: Mapping[str, Entry], names: Mapping[str, str]) -> list[Entry]:
    """The entries with the names that point to them, those with names first, then by score and id."""
    pointing: dict[str, list[str]] = {}
    for name, id in sorted(names.items()):
        pointing.setdefault(id, []).append(name)
    found = [dataclasses.replace(entry, names=tuple(pointing.get(id, ()))) for id, entry in entries.items()]
    return sorted(found, key=lambda entry: (not entry.names, -(entry.score or 0.0), entry.names, entry.id))
