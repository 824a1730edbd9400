"""The tables of one module, and the lanes that deltas have in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deltatune.methods.kinds import SelectionPatch
from deltatune.multi.forms import FORMS
from deltatune.multi.forms.form import Form
from deltatune.multi.table import Key, LaneName, Table

if TYPE_CHECKING:
    from deltatune.multi.opened import Opened
    from deltatune.multi.reading import Source, Spot

OWN = -1
"""Number of the lane of a delta's own task head."""


class Tables:
    """What the deltas of a bank have at one module; iterates over its tables.

    Attributes:
        spots: the patches at this module, by the name of their lane.
        table_of: the table of each lane; None where the patch is no data.
        loose: lanes whose patch is no data.
        own: deltas with a head of their own here.
    """

    def __init__(self, opened: Opened) -> None:
        self.spots: dict[LaneName, Spot] = {}
        self.table_of: dict[LaneName, Table | None] = {}
        self.loose: set[LaneName] = set()
        self.own: set[str] = set()
        self._opened = opened
        self._tables: dict[Key, Table] = {}
        self._counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables.values())

    def next_number(self, delta: str) -> int:
        """Of the delta's next patch here."""
        return self._counts.get(delta, 0)

    def place(self, spot: Spot) -> None:
        """Take in a patch; it has no lane yet."""
        self.spots[spot.name] = spot
        self._counts[spot.delta.name] = spot.number + 1

    def remove(self, delta: str) -> None:
        """Forget the lanes of one delta."""
        self.own.discard(delta)
        for name in [(delta, number) for number in (OWN, *range(self._counts.pop(delta, 0)))]:
            self.forget(name)
            self.spots.pop(name, None)

    def forget(self, name: LaneName) -> None:
        """A patch that is read together with another one has no lane."""
        self._leave(name)
        self.table_of.pop(name, None)
        self.loose.discard(name)

    def _leave(self, name: LaneName) -> None:
        table = self.table_of.get(name)
        if table is not None:
            table.leave(name, self._opened.newest)
            if not len(table):
                self._tables = {key: other for key, other in self._tables.items() if other is not table}

    @property
    def is_plain(self) -> bool:
        """A row with one delta reads one lane of each table here, and nothing else."""
        stages = [table for table in self if table.key.stage == "module"]
        return not (self.loose or self.own) and (len(stages) < 2 or not any(table.form.is_alone for table in stages))

    def lanes_of(self, delta: str) -> list[LaneName]:
        """The lanes of a delta, in the order in which its patches run; a head of its own stands in for what it selects there."""
        own = [(delta, OWN)] if delta in self.own else []
        numbers = range(self._counts.get(delta, 0))
        return own + [name for number in numbers if (name := (delta, number)) in self.table_of and not (own and self._selects(name))]

    def _selects(self, name: LaneName) -> bool:
        return name in self.spots and isinstance(self.spots[name].patch, SelectionPatch)

    def enter(self, name: LaneName, stage: str, source: Source | None, module: nn.Module, reads: str = "module") -> None:
        """Give a lane its data; None where the patch is none and rows with it run apart."""
        table: Table | None = None
        if source is not None:
            form = FORMS[source.lane.form]
            fitted = {key: tensor.detach() for key, tensor in form.fitted(source.lane.tensors).items()}
            table = self._table(Key.of(name, stage, reads, source, fitted), form, module, source, fitted)
            table.enter(name, fitted, self._opened.oldest, self._opened.newest)
        if self.table_of.get(name) is not table:
            self._leave(name)
        self.table_of[name] = table
        (self.loose.add if table is None else self.loose.discard)(name)

    def _table(self, key: Key, form: Form, module: nn.Module, source: Source, fitted: Mapping[str, Tensor]) -> Table:
        table = self._tables.get(key)
        if table is None:
            table = Table(key, form, module, source, fitted)
            self._tables = {**self._tables, key: table}
        return table
