"""What every runner is: it takes units of work from a queue and tells what happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from deltatune.study.trial import Failure, Outcome, Trial

Unit: TypeAlias = tuple[Trial, ...]
"""One trial, or several that share forwards."""


@dataclass(frozen=True)
class Begun:
    """A unit was begun.

    Attributes:
        unit: its trials.
    """

    unit: Unit


Happening: TypeAlias = Begun | Outcome | Failure


class Runner(ABC):
    """Carries trials out."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Units that run at the same time."""

    @abstractmethod
    def conduct(self, queue: deque[Unit]) -> Iterator[Happening]:
        """Take units from the left until none are left, and tell what happens; who listens may put more in meanwhile."""

    def close(self) -> None:
        """Give back what is held."""
