"""The header of a safetensors file, read by itself: names, types, shapes and sizes of the tensors, none of which is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from deltatune.checkpoint.strict_json import parse
from deltatune.checkpoint.tensors import header_length, regular_file_size
from deltatune.errors import CheckpointError

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip
"""What the format knows: its name -> bits of an entry."""

MAX_TENSORS = 2**18
MAX_AXES = 64


@dataclass(frozen=True)
class Stub:
    """A tensor as the header tells of it.

    Attributes:
        name: its name.
        dtype: its type in the format's words, such as ``F32``.
        shape: its shape.
        size_bytes: what it takes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: in the order of their names.
        metadata: strings the writer left.
        size_bytes: of the whole file.
    """

    tensors: tuple[Stub, ...]
    metadata: Mapping[str, str]
    size_bytes: int

    @property
    def values_bytes(self) -> int:
        """What the tensors take."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def read_header(file: Path) -> Header:
    """Names, types, shapes, sizes and metadata of a safetensors file; at most 16 MiB are read, and no tensor.

    Raises:
        CheckpointError: it is missing, a link, truncated, no safetensors file, or says what cannot be.
    """
    size = regular_file_size(file)
    try:
        with file.open("rb") as opened:
            length = header_length(opened, size)
            tensors, metadata = described(opened.read(length), size - 8 - length)
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"`{file}` is truncated or no safetensors file: {cause}. Copy it again.") from cause
    return Header(tensors, metadata, size)


def described(header: bytes, room: int) -> tuple[tuple[Stub, ...], Mapping[str, str]]:
    """The tensors and the metadata that a header tells of.

    Args:
        header: its JSON.
        room: bytes behind it.

    Raises:
        ValueError: it is none, or says what cannot be.
        RecursionError: it is nested beyond all sense.
    """
    raw = parse(header)
    if not isinstance(raw, dict):
        raise ValueError(f"its header holds {type(raw).__name__} instead of an object")
    metadata = _metadata(raw.pop("__metadata__", {}))
    if len(raw) > MAX_TENSORS:
        raise ValueError(f"it names {len(raw):,} tensors, of which {MAX_TENSORS:,} are the most")
    return tuple(_stub(name, raw[name], room) for name in sorted(raw)), metadata


def _stub(name: str, told: Any, room: int) -> Stub:
    """One tensor.

    Raises:
        ValueError: type, shape and place do not belong together, or lie outside the file.
    """
    shown = repr(name[:80])
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} is not described by dtype, shape and data_offsets")
    dtype, shape, place = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{shown} is of the type {dtype!r:.40}, which does not exist")
    if not _counts(shape) or len(shape) > MAX_AXES or not _counts(place) or len(place) != 2:
        raise ValueError(f"{shown} has no sensible shape or place: {shape!r:.60}, {place!r:.60}")
    start, end = place
    if not start <= end <= room or 8 * (end - start) != BITS[dtype] * prod(shape):
        raise ValueError(f"{shown} of shape {shape!r:.60} does not fit its place, {start} to {end} of {room:,} bytes")
    return Stub(name, dtype, tuple(shape), end - start)


def _counts(value: Any) -> bool:
    """A list of whole numbers below 2^63."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value.values()):
        raise ValueError("its metadata is no table of strings")
    return value
