"""How far a process's heap grows under the tensors of a step: the C library plays it through, and nobody touches the memory.

A tensor is served from a hole that an earlier one left, if one is large enough. Aligned memory takes a larger hole than it leaves, and
torch's small objects settle in between, so the heap grows beyond the high-water mark of live tensors: by a quarter to a half in steps
of transformers. Where the holes lie is the C library's own doing; so a bare process asks it for the same sizes in the same order.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

ALIGNMENT = 64
"""Of torch's tensors on a CPU, in bytes."""
BESIDE = (192, 80, 48, 400)
"""Bytes of the small objects that come and go with a tensor: tensor, storage, their counters, a node of the graph."""

Course = Sequence[tuple[int, int]]


class _Info(ctypes.Structure):
    """glibc's ``mallinfo2``; the first number is the heap's size."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"bcdefghij")]


def grown(course: Course, options: Iterable[tuple[int, int]]) -> int | None:
    """Bytes that a heap grows to under the course of some tensors; None where the C library does not tell.

    Args:
        course: (number, bytes) where a tensor begins, (number, 0) where it ends; see ``live.LiveTensors``.
        options: what to set by ``mallopt`` ahead, as (number, value).
    """
    given = json.dumps({"course": list(course), "options": list(options)})
    done = subprocess.run([sys.executable, "-I", __file__], input=given, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _play(course: Course, options: Iterable[tuple[int, int]]) -> int:
    """The same in this process, which should hold nothing else.

    Raises:
        AttributeError: the C library is not glibc.
        MemoryError: it has no room.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    for option in options:
        libc.mallopt(*option)
    before, taken, place = libc.mallinfo2().arena, dict[int, list[int | None]](), ctypes.c_void_p()
    for number, size in course:
        if not size:
            for address in taken.pop(number, []):
                libc.free(address)
            continue
        if libc.posix_memalign(ctypes.byref(place), ALIGNMENT, size):
            raise MemoryError(f"no room for {size} bytes")
        taken[number] = [place.value, *(libc.malloc(small) for small in BESIDE)]
    return int(libc.mallinfo2().arena - before)


if __name__ == "__main__":
    print(_play(**json.load(sys.stdin)))
