"""Planning: from what each row uses to what every module does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from deltatune.injection.rows import RowPrefixes
from deltatune.methods.lanes import Lane
from deltatune.multi.act import RouteAct
from deltatune.multi.contexts import Context, plan_contexts
from deltatune.multi.lanes import Lanes
from deltatune.multi.own import Own
from deltatune.multi.picks import Picks
from deltatune.multi.plan import Apart, Plan, Program, Step, Use, Work, members_of, names_of
from deltatune.multi.reading import Spot, read
from deltatune.multi.table import LaneName, Table

if TYPE_CHECKING:
    from deltatune.multi.ground import Ground
    from deltatune.multi.streams import Streams


class Planner:
    """Makes the plan of one route; picks that come out alike at many modules are made once.

    Args:
        number: of the route.
        entries: what each row uses.
        acts: those of the backbone, by number.
        contexts: its context acts.
        training: the deltas that gradients may reach.
        streams: whose random numbers each row's dropout takes; None for the global ones.
        grounds: where what deltas train lies side by side.
    """

    def __init__(
        self,
        number: int,
        entries: Sequence[Program],
        acts: Mapping[int, RouteAct],
        contexts: Mapping[int, Context],
        training: frozenset[str],
        streams: Streams | None = None,
        grounds: Sequence[Ground] = (),
    ) -> None:
        self.number, self.entries, self.training, self.grounds = number, tuple(entries), training, tuple(grounds)
        self.acts, self.contexts, self.streams = acts, contexts, streams
        self.programs = tuple(dict.fromkeys(self.entries))
        self.rows_of: dict[Program, list[int]] = {}
        for row, program in enumerate(self.entries):
            self.rows_of.setdefault(program, []).append(row)
        self.names = {program: names_of([program]) for program in self.programs}
        self.members = {program: members_of(program) for program in self.programs}
        self.single = self._single()
        self.depth = max((len(self.members[program] or ()) for program in self.programs), default=0)
        self._picks: dict[tuple[tuple[int, ...], torch.device, int], Picks] = {}

    def plan(self) -> Plan:
        """The plan."""
        works = {number: self._work(act) for number, act in self.acts.items()}
        contexts = plan_contexts(self.contexts, self.rows_of, len(self.entries))
        prefixes = any(isinstance(found, RowPrefixes) for found in contexts.values())
        return Plan(self.number, self.entries, works, contexts, prefixes)

    def _work(self, act: RouteAct) -> Work:
        """What one module does."""
        if self.single is not None and act.tables.is_plain:
            return self._joined(act, {(0, table): self._lanes(table, self.single) for table in act.tables}, ())
        lanes: dict[tuple[int, Table], dict[int, LaneName]] = {}
        aparts: list[Apart] = []
        for program in self.programs:
            if not any(name in act.members for name in self.names[program]):
                continue
            placed = self._placed(act, program)
            rows = self.rows_of[program]
            if placed is None:
                aparts.append(Apart(torch.tensor(rows, device=_device(act)), program))
                continue
            for k, name, table in placed:
                lanes.setdefault((k, table), {}).update(dict.fromkeys(rows, name))
        return self._joined(act, lanes, tuple(aparts))

    def _single(self) -> list[tuple[int, str]] | None:
        """Rows with the one delta of each; None where some row has several."""
        if any(members is None or len(members) > 1 for members in self.members.values()):
            return None
        return [(row, program[0].members[0]) for row, program in enumerate(self.entries) if program]

    @staticmethod
    def _lanes(table: Table, rows: Sequence[tuple[int, str]]) -> dict[int, LaneName]:
        number, lanes = table.key.number, table.lanes
        return {row: name for row, delta in rows if (name := (delta, number)) in lanes}

    def _placed(self, act: RouteAct, program: Program) -> list[tuple[int, LaneName, Table]] | None:
        """Delta's place, lane and table of each patch of a program here; None where the rows must be computed apart."""
        members = self.members[program]
        if members is None:
            return None
        found: list[tuple[int, LaneName, Table]] = []
        for k, delta in enumerate(members):
            for name in act.tables.lanes_of(delta):
                table = act.tables.table_of[name]
                if table is None:
                    return None
                found.append((k, name, table))
        alone = [table.form.is_alone for _, _, table in found if table.key.stage == "module"]
        return None if any(alone) and len(alone) > 1 else found

    def _joined(self, act: RouteAct, lanes: Mapping[tuple[int, Table], Mapping[int, LaneName]], aparts: tuple[Apart, ...]) -> Work:
        """Every table of the module at every place, used or not: compiled code sees the same for all routes."""
        tables = sorted(act.tables, key=lambda table: table.key.number)
        uses = {(k, table): self._use(act, table, lanes.get((k, table), {})) for k in range(self.depth) for table in tables}
        steps, module = [], []
        for k in range(self.depth):
            staged: dict[str, list[Use]] = {"input": [], "output": [], "module": []}
            for table in tables:
                staged[table.key.stage].append(uses[k, table])
            steps.append(Step(tuple(reversed(staged["input"])), tuple(staged["output"])))
            module += staged["module"]
        edits = any(not use.is_idle for step in steps for use in step.inputs)
        return Work(tuple(module), tuple(steps), aparts, edits)

    def _use(self, act: RouteAct, table: Table, rows: Mapping[int, LaneName]) -> Use:
        numbers = tuple(table.lanes[rows[row]] if row in rows else 0 for row in range(len(self.entries)))
        picks = self._picked(numbers, table)
        trained = dict.fromkeys(name for name in rows.values() if name[0] in self.training and name in act.tables.spots)
        lanes = Lanes(table.tensors, picks, lasts=True, whole=table.is_whole)
        if not trained:
            return Use(table, lanes)
        numbers_of = {name: k + 1 for k, name in enumerate(dict.fromkeys(rows.values()))}
        compact = tuple(numbers_of[rows[row]] if row in rows else 0 for row in range(len(self.entries)))
        own = Own(table.form, [partial(_own, act.tables.spots[name]) for name in numbers_of], self.grounds, zero=0 in compact)
        return Use(table, lanes, own, self._picked(compact, table, first=0 if own.zero else 1))

    def _picked(self, numbers: tuple[int, ...], table: Table, first: int = 0) -> Picks:
        device = next(iter(table.tensors.values())).device
        key = numbers, device, first
        if key not in self._picks:
            self._picks[key] = Picks(numbers, device, self.streams, first)
        return self._picks[key]


def _own(spot: Spot) -> Lane:
    """The delta's own tensors as a lane."""
    source = read(spot)
    assert source is not None
    return source.lane


def _device(act: RouteAct) -> torch.device:
    spot = next(iter(act.tables.spots.values()))
    return spot.site.device
