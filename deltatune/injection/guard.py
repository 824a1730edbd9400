"""The guard of a backbone whose weights are swapped for the length of a forward: one thread at a time."""

from __future__ import annotations

import threading
from typing import Any

from deltatune.errors import Busy


class Guard:
    """One thread at a time swaps the weights of a backbone; the same thread may nest."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def enter(self) -> None:
        """Take the guard.

        Raises:
            Busy: another thread is inside a forward with swapped weights.
        """
        if not self._lock.acquire(blocking=False):
            raise Busy(
                "A second thread called this backbone while the first was inside a forward with swapped weights. "
                "Run one forward at a time, or give each thread its own copy.deepcopy(backbone)."
            )

    def leave(self) -> None:
        """Give it back."""
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return Guard()

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()
