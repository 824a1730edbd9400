"""The routes of a bank: which are open, and which one computes now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from deltatune.errors import Busy
from deltatune.injection.around import Around
from deltatune.multi.lock import Lock

if TYPE_CHECKING:
    from deltatune.multi.act import RouteAct
    from deltatune.multi.plan import Plan


class Opened:
    """Numbers and owner of the routes over one backbone.

    Attributes:
        plan: of the route that computes now; None outside of routes.
        rows: how many rows it has.
        newest: number of the newest route.
        numbers: of the routes that are open, and of those of which a backward may yet compute parts anew.
    """

    def __init__(self, around: Around, lock: Lock) -> None:
        self.plan: Plan | None = None
        self.rows = 1
        self.newest = 0
        self.numbers: list[int] = []
        self._around, self._lock = around, lock
        self._owner = 0
        self._keeping: dict[int, RouteAct] = {}

    @property
    def oldest(self) -> int:
        """Number of the oldest route that is open, or of the next one."""
        return min(self.numbers, default=self.newest + 1)

    def keep(self, act: RouteAct) -> None:
        """An act keeps what sub-layers were given, or ceases to."""
        rest = {number: other for number, other in self._keeping.items() if other is not act}
        self._keeping = {**rest, act.number: act} if act.begins else rest

    def close(self, plan: Plan) -> None:
        """A route is over."""
        with self._lock:
            self.numbers.remove(plan.number)

    def check_owner(self) -> None:
        """No other thread has a route open; what a backward computes anew belongs to whoever waits for it.

        Raises:
            Busy: one has.
        """
        if self.plan is not None and self._owner != threading.get_ident() and torch._C._current_graph_task_id() == -1:
            raise busy()

    @property
    def is_own(self) -> bool:
        """This thread opened the route that computes now."""
        return self._owner == threading.get_ident()

    @contextmanager
    def entered(self, plan: Plan | None) -> Iterator[None]:
        """This plan for a moment: while its route is open, and where a backward computes a part of its forward anew.

        Raises:
            Busy: another thread has a route open.
        """
        switch = self._around.switch if plan is not None and plan.has_prefixes else None
        with self._lock:
            self.check_owner()
            before, rows, owner = self.plan, self.rows, self._owner
            self.plan, self.rows, self._owner = plan, 1 if plan is None else plan.rows, threading.get_ident()
        if switch is not None:
            switch.count(1)
        try:
            yield
        finally:
            self.plan, self.rows, self._owner = before, rows, owner
            for act in self._keeping.values():  # an error may have kept a sub-layer from its end
                act.drop()
            if switch is not None:
                switch.count(-1)


def busy() -> Busy:
    """What a second thread is told."""
    return Busy(
        "A second thread used this backbone while the first had a route open. Run one forward at a time, open the route in the thread that "
        "computes, or give each thread its own copy.deepcopy(backbone)."
    )
