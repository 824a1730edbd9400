"""The runner in the driver's own process: one unit behind the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from deltatune.study.runner.runner import Begun, Happening, Runner, Unit
from deltatune.study.runner.work import carry_out


class LocalRunner(Runner):
    """Trials in this process.

    Args:
        folder: of the study.
        limit: most seconds of one trial.
    """

    def __init__(self, folder: Path, limit: float | None = None) -> None:
        self.folder = folder
        self.limit = limit

    @property
    def at_once(self) -> int:
        """One."""
        return 1

    def conduct(self, queue: deque[Unit]) -> Iterator[Happening]:
        """One unit behind the other."""
        while queue:
            unit = queue.popleft()
            yield Begun(unit)
            yield from carry_out(unit, self.folder, self.limit)
