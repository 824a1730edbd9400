"""Folders that are written whole or not at all: beside their place first, then swapped in with one system call."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from deltatune.errors import OutputError

SAVING = ".saving"
PREVIOUS = ".previous"


@contextmanager
def replacing(folder: str | os.PathLike[str], *, overwrite: bool = False, ours: Collection[str] | None = None) -> Iterator[Path]:
    """An empty folder to write into; when the block ends it takes the place of ``folder``, and at no moment is there a mixture.

    Killed at any moment, this leaves the old folder or the new one; the next call sweeps up what was left beside it.

    Args:
        folder: where it shall be; parents are made.
        overwrite: whether a folder with files in it may be replaced.
        ours: the names that are replaced; everything else in the old folder is kept. All names if left out.

    Raises:
        OutputError: the folder exists, or cannot be written. Nothing is left behind then.
    """
    target = Path(os.path.abspath(place_of(folder)))
    try:
        target = target.resolve()
        settle(target)
        check_free(target, overwrite)
        made = _make_parents(target)
    except (OSError, ValueError) as cause:
        raise _unwritable(target, cause) from cause
    fresh: Path | None = None
    try:
        _sweep(target)
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SAVING}")
        fresh.mkdir()
        with locked(fresh):
            yield fresh
            if target.is_dir():
                os.chmod(fresh, stat.S_IMODE(target.stat().st_mode))
                if ours is not None:
                    _keep_others(target, fresh, ours)
            _sync(fresh)
            _swap(fresh, target)
    except BaseException as cause:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(cause, OSError):
            raise _unwritable(target, cause) from cause
        raise


def place_of(folder: str | os.PathLike[str]) -> Path:
    """A path as a user means it: ``~`` is their home."""
    return Path(os.path.expanduser(folder))


def settle(folder: Path) -> None:
    """Finish a swap that was killed between its two renames, where the file system has no exchange."""
    previous = folder.with_name(f".{folder.name}{PREVIOUS}")
    if previous.is_dir() and not folder.exists():
        os.rename(previous, folder)


def check_free(target: Path, overwrite: bool) -> None:
    """A delta may be written to ``target``.

    Raises:
        OutputError: something is there already, or the process stands in it: it would be left in a folder that is gone.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"`{target}` is a file; a delta is saved as a folder. Choose another name.")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise OutputError(f"`{target}` exists already and is not empty. Pass overwrite=True to replace it, or choose another folder.")
    if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
        raise OutputError(
            f"`{target}` is replaced as a whole, and this process works in it, so it would be left nowhere. Save to a folder below it, "
            "such as `./delta`."
        )


def _unwritable(target: Path, cause: Exception) -> OutputError:
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return OutputError(f"`{target}` cannot be written: {reason}. Nothing was changed. Free some space, or choose another folder.")


def _make_parents(target: Path) -> list[Path]:
    """Make the missing parents; returns them, innermost first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder being written, once nobody else does; it ends with the process, so a leftover is known by its absence."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed saves of this folder left beside it."""
    for left in target.parent.iterdir():
        if left.name.startswith(f".{target.name}.") and left.name.endswith(SAVING) and not _is_held(left):
            shutil.rmtree(left, ignore_errors=True)
    if target.exists():
        shutil.rmtree(target.with_name(f".{target.name}{PREVIOUS}"), ignore_errors=True)


def _is_held(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _keep_others(old: Path, new: Path, ours: Collection[str]) -> None:
    """Link what is not ours from the old folder into the new one."""
    for entry in old.iterdir():
        if entry.name in ours:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        elif entry.is_symlink():
            os.symlink(os.readlink(entry), new / entry.name)
        else:
            _link(str(entry), str(new / entry.name))


def _link(source: str, place: str) -> str:
    try:
        os.link(source, place)
    except OSError as cause:
        if cause.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, place)
    return place


def _sync(folder: Path) -> None:
    """Bring the content of all files to the disk.

    Each flush waits for the device, so there are no more than needed: a new file's name goes along with its content, and the
    folder's own with its parent's, once it is in its place.
    """
    for path, _, files in os.walk(folder):
        for place in (os.path.join(path, name) for name in files):
            if not os.path.islink(place):
                _sync_entry(place)


def _swap(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``, and remove what was there."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(fresh, target)
        old = None
    elif exchange(fresh, target):
        old = fresh
    else:
        old = target.with_name(f".{target.name}{PREVIOUS}")
        os.rename(target, old)
        os.rename(fresh, target)
    _sync_entry(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync_entry(place: str | os.PathLike[str]) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    swap, here = 2, -100  # RENAME_EXCHANGE on Linux and RENAME_SWAP on macOS; AT_FDCWD
    if sys.platform == "darwin":
        call = getattr(library, "renamex_np", None)
        return call is not None and call(os.fsencode(a), os.fsencode(b), swap) == 0
    call = getattr(library, "renameat2", None)
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0
