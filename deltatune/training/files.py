"""Files that are whole or absent, and folders whose marker says that they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from deltatune.errors import OutputError

MARKER = "complete.json"


@contextlib.contextmanager
def writing(target: Path, faults: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What goes wrong while something is written, in our words.

    Args:
        target: file or folder.
        faults: further errors that mean so here; torch.save tells of a full disk by various RuntimeErrors.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    caught: tuple[type[Exception], ...] = (OSError, SafetensorError, *faults)
    try:
        yield
    except caught as cause:
        raise OutputError(
            f"`{target}` cannot be written: {cause}. Free some space, or choose an output folder you can write to."
        ) from cause


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``target``, then put it in place by one rename.

    Raises:
        OutputError: it cannot be written; what was there before is still there.
    """
    with writing(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        scratch = Path(name)
        try:
            write(scratch)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner only
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """A text file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(target, lambda scratch: _fill(scratch, text))


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def mark_complete(folder: Path) -> None:
    """Write the marker, which lists every file with its size."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    write_text(folder / MARKER, json.dumps(sizes, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file it lists has its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def discard(folder: Path) -> None:
    """Remove a folder; its marker goes first, so that a kill halfway leaves nothing that counts as complete."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
