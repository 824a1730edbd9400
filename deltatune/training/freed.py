"""Memory that a step has freed stays with the process until training ends, so that the next step need not ask the system for it again.

A step makes the same large tensors as the one before. On Linux the C library gives each of them back to the system when it is freed, and
takes zeroed pages for the next: tens of thousands of page faults a step, a tenth of its time and more (``benchmarks/step.py``). Torch
keeps freed memory of GPUs itself; on CPUs nobody does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""glibc's numbers of what ``mallopt`` sets: see its manual page."""

KEEPING = ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0))
"""Nothing is given back, and nothing is taken from the system beside the heap."""

MIB = 2**20

_users: list[object] = []


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Keep what is freed within the block, then give it back; does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    user = object()
    _users.append(user)
    for option in KEEPING:
        libc.mallopt(*option)
    try:
        yield
    finally:
        _users.remove(user)
        if not _users:
            libc.mallopt(MMAP_MAX, 65536)
            libc.mallopt(MMAP_THRESHOLD, 32 * MIB)  # where glibc itself arrives once a large tensor was freed
            libc.mallopt(TRIM_THRESHOLD, 64 * MIB)
            give_back()


def give_back() -> None:
    """Whole pages that hold nothing go back to the system, also within ``keeping_freed``; does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # no C library to be had under that name, as on Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
