"""What ``delta.json`` says about a delta or a composition: written with sorted keys and nothing of its moment, read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from deltatune.annotations import fits
from deltatune.checkpoint.fingerprint import Fingerprint
from deltatune.checkpoint.keys import fold, unfold
from deltatune.checkpoint.strict_json import MAX_DEPTH, MAX_WHOLE, parse
from deltatune.checkpoint.tensors import regular_file_size
from deltatune.errors import CheckpointError, InvalidValue, nearest
from deltatune.injection.slot import How
from deltatune.methods.kinds import Method, methods

FORMAT = "deltatune"
FORMAT_VERSION = 1
RECORD, TENSORS, MEMBERS = "delta.json", "delta.safetensors", "members"
DIGEST = "digest"
RUN_DELTA = "delta"
"""Where the folder of a run holds its delta."""
MAX_RECORD = 16 * 2**20

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version -> what turns a ``delta.json`` of that version into one of the next."""


@dataclass(frozen=True)
class About:
    """What a delta was made for and how, as far as the caller of ``save`` knows. Everything is stored as JSON.

    Attributes:
        where: what ``attach`` was given; the record's ``sites`` say exactly where the delta sits.
        layers: what ``attach`` was given.
        task: name of the task.
        labels: names of its labels, in the order of the head's outputs.
        template: how its rows become text.
        metric: name of the metric that counts.
        score: its value.
        metrics: all values, by name.
        training: settings of the run.
        data: fingerprint of the training data.
        versions: library -> version, of the training.
    """

    where: Any = None
    layers: Any = None
    task: str | None = None
    labels: Sequence[str] | None = None
    template: Any = None
    metric: str | None = None
    score: float | None = None
    metrics: Mapping[str, float] | None = None
    training: Mapping[str, Any] | None = None
    data: Any = None
    versions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Origin:
    """The backbone a delta was trained on.

    Attributes:
        id: name that opens it again: alias, hub id or folder; None if the caller of ``save`` did not say.
        dtype: of its first floating-point parameter.
        num_labels: outputs of the task head that belongs to the delta; None where there is none.
        fingerprint: what it is known by.
    """

    id: str | None
    dtype: str
    num_labels: int | None
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Stored:
    """The tensor file of a delta.

    Attributes:
        sha256: of the whole file.
        differences: selected parameters stored as theta - theta_0, where adding theta_0 restores the exact bits.
        values: selected parameters stored as theta.
    """

    sha256: str
    differences: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``delta.json``, where keys that differ only in numbers are one entry."""
        return {"sha256": self.sha256, "differences": fold(self.differences), "values": fold(self.values)}


@dataclass(frozen=True)
class Record:
    """Everything about a saved delta or composition but its tensors; ``read`` returns it.

    Attributes:
        name: what it was called.
        method: registered name of the method; None for a composition.
        fields: every field of the method.
        sites: keys of the sites it sits at.
        heads: keys of the task heads that belong to it.
        exported: whether its training-time parameters were dropped; None where the method has no such form.
        stored: its tensor file; None for a composition without mixers.
        origin: the backbone it belongs to.
        about: task, scores and training.
        how: of a composition; see ``compose``.
        weights: of a composition.
        members: names of a composition's members, with the SHA-256 of their records.
        member_records: what ``read`` found there.
    """

    name: str
    origin: Origin
    about: About
    stored: Stored | None = None
    method: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    exported: bool | None = None
    how: How | None = None
    weights: tuple[float, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    member_records: tuple[Record, ...] = field(default=(), compare=False)

    @property
    def is_composition(self) -> bool:
        """It is several deltas acting together."""
        return self.how is not None

    def build_method(self, *, allow_unknown: bool = False) -> Method:
        """The method, with every field as it was; a field that is newer than the file has its default.

        Raises:
            CheckpointError: the method or a field is not known here.
            InvalidValue: a field out of its range.
        """
        if self.method is None:
            raise CheckpointError(f"`{self.name}` is a composition of {', '.join(f'`{name}`' for name, _ in self.members)}, not one delta.")
        if self.method not in methods:
            raise CheckpointError(
                f"`{self.name}` was made by the method `{self.method}`, which is not registered here. {nearest(self.method, methods)} "
                "Install the package that defines it, or upgrade deltatune."
            )
        kind = methods[self.method]
        known = {known.name for known in dataclasses.fields(kind)}
        foreign = sorted(self.fields.keys() - known)
        if foreign and not allow_unknown:
            raise CheckpointError(
                f"`{self.name}` has the field `{foreign[0]}`, which {kind.__name__} does not know. {nearest(foreign[0], known)} "
                "Upgrade deltatune, or pass allow_unknown=True to ignore it."
            )
        hints = _hints(kind)
        values = {name: _tuples(value) for name, value in self.fields.items() if name in known}
        for name, value in values.items():
            if not fits(value, hints[name]):
                raise CheckpointError(
                    f"`{self.name}` has {name}={value!r}, but {kind.__name__}.{name} is of type {hints[name]}. Save the delta again."
                )
        return kind(**values)

    def to_bytes(self) -> bytes:
        """The content of ``delta.json``.

        Raises:
            InvalidValue: something in it is not JSON.
        """
        origin = {
            "id": self.origin.id,
            "dtype": self.origin.dtype,
            "num_labels": self.origin.num_labels,
            "fingerprint": self.origin.fingerprint.to_json(),
        }
        composition = {"how": self.how, "weights": self.weights, "members": self.members} if self.is_composition else None
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "method": {"name": self.method, "fields": self.fields} if self.method is not None else None,
            "sites": fold(self.sites),
            "heads": fold(self.heads),
            "exported": self.exported,
            "tensors": None if self.stored is None else self.stored.to_json(),
            "backbone": origin,
            "composition": composition,
            **{name: value for name, value in vars(self.about).items()},
        }
        return sealed(_plain(data, self.name))


def sealed(data: Mapping[str, Any]) -> bytes:
    """The content of ``delta.json``: ``data`` with the digest of all of it."""
    text = json.dumps({**data, DIGEST: digest_of(data)}, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of what a record says, however it is laid out, but for the digest itself."""
    said = {key: value for key, value in data.items() if key != DIGEST}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_record(file: Path, *, allow_unknown: bool = False, allow_edited: bool = False) -> Record:
    """Read a ``delta.json``.

    Raises:
        CheckpointError: it is missing, no JSON, of a newer format, was edited, or has missing, unknown or mistyped keys.
    """
    size = regular_file_size(file)
    if size > MAX_RECORD:
        raise CheckpointError(f"`{file}` has {size:,} bytes; a record has at most {MAX_RECORD:,}. It is not one of ours.")
    try:
        data = parse(file.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"`{file}` is truncated or was edited: {cause}. Copy or save the delta again.") from cause
    return _record(_Keys(data, file, allow_unknown), allow_edited)


class _Keys:
    """Takes typed values out of a JSON object, and complains about what is left."""

    def __init__(self, data: object, file: Path, lenient: bool, inside: str = "") -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"`{file}` is not a delta's record: {inside or 'it'} holds {type(data).__name__} instead of an object.")
        self.data: dict[str, Any] = dict(data)
        self.file, self.lenient, self.inside = file, lenient, inside

    def take(self, key: str, hint: Any) -> Any:
        """The value of a key that must be there, with lists as tuples."""
        if key not in self.data:
            raise CheckpointError(f"`{self.file}` lacks the key `{self.inside}{key}`. Copy or save the delta again.")
        value = self.data.pop(key)
        if not fits(_tuples(value), hint):
            raise CheckpointError(
                f"`{self.file}` has {self.inside}{key} = {value!r:.80}, which is not of type {hint}. Copy or save the delta again."
            )
        return _tuples(value)

    def take_keys(self, key: str) -> tuple[str, ...]:
        """A list of keys of sites or tensors, written out."""
        folded: tuple[str, ...] = self.take(key, tuple[str, ...])
        try:
            return unfold(folded)
        except ValueError as cause:
            raise CheckpointError(
                f"`{self.file}` has {self.inside}{key} that make no sense: {cause}. Copy or save the delta again."
            ) from cause

    def below(self, key: str) -> _Keys:
        """The object under a key."""
        return _Keys(self.data.pop(key, None), self.file, self.lenient, f"{self.inside}{key}.")

    def end(self) -> None:
        """Nothing may be left."""
        if self.data and not self.lenient:
            names = ", ".join(f"`{self.inside}{key}`" for key in sorted(self.data)[:4])
            raise CheckpointError(
                f"`{self.file}` has keys this version of deltatune does not know: {names}. Upgrade deltatune, or pass allow_unknown=True."
            )


def _record(keys: _Keys, allow_edited: bool) -> Record:
    keys = _migrated(keys, allow_edited)
    method = keys.below("method") if keys.data.get("method") is not None else None
    tensors = keys.below("tensors") if keys.data.get("tensors") is not None else None
    composition = keys.below("composition") if keys.data.get("composition") is not None else None
    if (method is None) == (composition is None) or (method is not None and tensors is None):
        raise CheckpointError(f"`{keys.file}` describes neither a delta with its tensors nor a composition. Copy or save it again.")
    for key in ("method", "tensors", "composition"):
        keys.data.pop(key, None)
    hints = _hints(About)
    record = Record(
        name=keys.take("name", str),
        origin=_origin(keys.below("backbone")),
        about=About(**{entry.name: keys.take(entry.name, hints[entry.name]) for entry in dataclasses.fields(About)}),
        stored=None if tensors is None else _stored(tensors),
        sites=keys.take_keys("sites"),
        heads=keys.take_keys("heads"),
        exported=keys.take("exported", bool | None),
        **({} if method is None else {"method": method.take("name", str), "fields": method.take("fields", dict[str, Any])}),
        **({} if composition is None else _composition(composition)),
    )
    for part in (method, keys):
        if part is not None:
            part.end()
    return record


def _migrated(keys: _Keys, allow_edited: bool) -> _Keys:
    """The keys as the current format version has them, and as they were written."""
    found = digest_of(keys.data)
    if keys.take("format", str) != FORMAT:
        raise CheckpointError(f"`{keys.file}` is not a delta's record. Give a folder written by dt.save.")
    version = keys.take("format_version", int)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"`{keys.file}` has format version {version}, and this deltatune reads up to {FORMAT_VERSION}. Upgrade deltatune to read it."
        )
    if keys.take(DIGEST, str) != found and not allow_edited:
        raise CheckpointError(
            f"`{keys.file}` was edited: what it says has another digest than it had when it was saved. Copy or save the delta again, or "
            "pass allow_edited=True to take it as it is."
        )
    for step in range(version, FORMAT_VERSION):
        if step not in MIGRATIONS:
            raise CheckpointError(f"`{keys.file}` has format version {version}, which never was. Copy or save the delta again.")
        keys.data = MIGRATIONS[step](keys.data)
    return keys


def _stored(keys: _Keys) -> Stored:
    stored = Stored(keys.take("sha256", str), keys.take_keys("differences"), keys.take_keys("values"))
    keys.end()
    return stored


def _origin(keys: _Keys) -> Origin:
    prints = keys.below("fingerprint")
    seen = Fingerprint(
        class_name=prints.take("class", str),
        parameters=prints.take("parameters", int),
        structure=prints.take("structure", str),
        weights=prints.take("weights", str),
        vocabulary=prints.take("vocabulary", dict[str, int]),
        samples=prints.take("samples", dict[str, str]),
    )
    if any(sample.count(" ") != 2 for sample in seen.samples.values()):
        raise CheckpointError(f"`{keys.file}` has a malformed `backbone.fingerprint.samples`. Copy or save the delta again.")
    origin = Origin(keys.take("id", str | None), keys.take("dtype", str), keys.take("num_labels", int | None), seen)
    prints.end()
    keys.end()
    return origin


def _composition(keys: _Keys) -> dict[str, Any]:
    parts = {
        "how": keys.take("how", How),
        "weights": keys.take("weights", tuple[float, ...]),
        "members": keys.take("members", tuple[tuple[str, str], ...]),
    }
    keys.end()
    names = {name for name, _ in parts["members"]}
    if not len(parts["weights"]) == len(parts["members"]) == len(names) or len(names) < 2:
        raise CheckpointError(
            f"`{keys.file}` composes {len(names)} different members with {len(parts['weights'])} weights. Copy or save it again."
        )
    return parts


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """``value`` as JSON can say it, within the bounds of what is read."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, int | float):
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) >= MAX_WHOLE):
            raise InvalidValue(
                f"Delta `{name}` cannot be saved: {value:.8g} stands in its record, and JSON has no such number. Leave it out."
            )
        return value
    if depth >= MAX_DEPTH:
        raise InvalidValue(f"Delta `{name}` cannot be saved: its record would be nested more than {MAX_DEPTH} deep. Leave some of it out.")
    if isinstance(value, Mapping):
        return {_key(key, name): _plain(inner, name, depth + 1) for key, inner in value.items()}
    if isinstance(value, Sequence | range):
        return [_plain(inner, name, depth + 1) for inner in value]
    raise InvalidValue(
        f"Delta `{name}` cannot be saved: its record would hold {value!r:.80} ({type(value).__name__}). "
        "Give strings, numbers, lists and mappings of them."
    )


def _key(key: Any, name: str) -> str:
    if isinstance(key, str):
        return _text(key, name)
    raise InvalidValue(f"Delta `{name}` cannot be saved: its record would have the key {key!r}, and JSON takes strings only.")


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        raise InvalidValue(f"Delta `{name}` cannot be saved: its record would hold {value!r:.80}, which is no Unicode text.") from cause
    return value


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at every depth."""
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return value
