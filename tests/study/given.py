"""What processes of their own are given to do in tests; it imports little, because each of them imports it anew."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from deltatune.errors import InvalidValue
from deltatune.study.procedures.apart import apart


def give(what: str) -> int:
    """A process's number, or an end."""
    if what == "ours":
        raise InvalidValue("not like this")
    if what == "killed":
        os._exit(9)
    return os.getpid()


def watched(place: str) -> None:
    """Start a process of its own that says its number and sleeps; to be killed meanwhile."""
    apart(sleeping, place)


def sleeping(place: str) -> None:
    """Say the number of this process, and wait."""
    Path(place).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


if __name__ == "__main__":
    watched(sys.argv[1])
