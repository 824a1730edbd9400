"""Tensors in a safetensors file: written byte for byte the same each time, read with limits set before anything is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltatune.errors import CheckpointError, Unsupported

MAX_HEADER = 16 * 2**20
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a delta file can hold, in the order in which safetensors lays types out."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors and return the SHA-256 of the file. Their order does not matter, and nothing else goes in.

    Raises:
        Unsupported: a tensor is quantised, sharded, or of a type the format lacks.
        OSError: the disk is full, or the file cannot be written.
    """
    check_storable(tensors)
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for name in names:
            block = tensors[name].detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """A delta file can hold these tensors.

    Raises:
        Unsupported: one is quantised, sharded, without values, or of a type the format lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or type(tensor.data) is not Tensor or tensor.is_meta:
            raise Unsupported(
                f"The tensor `{name}` cannot go into a delta file: it is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}. "
                "Save from plain tensors: unquantised, gathered and in memory."
            )


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file; they are mapped from the disk, not copied.

    Args:
        path: the file.
        sha256: of its whole content, where that is known.

    Raises:
        CheckpointError: the file is missing, a link, truncated, edited, or no safetensors file.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as file:
            header_length(file, size)
            file.seek(0)
            found = None if sha256 is None else hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"`{path}` is truncated or no safetensors file: {cause}. Copy or save it again.") from cause
    if found != sha256:
        raise CheckpointError(
            f"`{path}` is truncated or was edited: its SHA-256 is {str(found)[:16]}..., and `delta.json` beside it says "
            f"{str(sha256)[:16]}.... Copy or save the folder again."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, UnicodeError) as cause:
        raise CheckpointError(f"`{path}` is no valid safetensors file: {cause}. Copy or save it again.") from cause


def header_length(file: BinaryIO, size: int) -> int:
    """Bytes of the header of an opened safetensors file of this size, read from its beginning; the header follows.

    Raises:
        ValueError: it cannot be so long.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"it has {size:,} bytes and claims {length:,} for its header, of which {MAX_HEADER:,} are the most")
    return length


def regular_file_size(path: Path) -> int:
    """Size of a regular file.

    Raises:
        CheckpointError: there is none, or it is a link, which could lead out of the folder.
    """
    try:
        found = os.lstat(path)
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"`{path}` cannot be read ({cause}). Check the folder, or save the delta again.") from cause
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise CheckpointError(f"`{path}` is {kind}; delta files are read from regular files only. Copy its content into the folder.")
    return found.st_size


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(_finite(tensor))]


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()


def named(names: Iterable[str], most: int = 4) -> str:
    """The first few names, for an error.

    >>> named(["a", "b", "c"], most=2)
    '`a`, `b` and 1 more'
    """
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
