"""The bank of a backbone: the lanes of all deltas that were routed, and the plans of routes over them.

A delta enters when a route first names it, or by ``add``, and is entered anew when its tensors have changed. Tables are
replaced or extended where nobody reads, so one thread may add and remove deltas while another one computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.heads import read_head
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.around import Guest
from deltatune.injection.attach import add_act
from deltatune.injection.branches import Given
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.slot import Member, open_slot
from deltatune.injection.steps import steps
from deltatune.methods.kinds import BranchInputPatch, BranchPatch, SelectionPatch, TokenPatch
from deltatune.multi.act import RouteAct
from deltatune.multi.contexts import Context, context_at
from deltatune.multi.heads import place_head, remove_head
from deltatune.multi.lock import Lock
from deltatune.multi.plan import Plan, Program
from deltatune.multi.planning import Planner
from deltatune.multi.reading import NOTHING, READERS, Spot, check_routable, read
from deltatune.multi.recompute import checkpointing

if TYPE_CHECKING:
    from deltatune.multi.ground import Ground
    from deltatune.multi.streams import Streams

VERSION = attrgetter("_version")


@dataclass
class Record:
    """A delta in the bank.

    Attributes:
        delta: the delta.
        spots: its patches at the modules that run them, each with the act there.
        tensors: what its lanes were made from, each with where it is held.
        selected: the values of what it selects, likewise.
        stamp: how many steps optimizers had made then.
        training: a patch was in training then.
        total: the sum of the versions of what counts its writes.
        counted: that.
    """

    delta: Delta
    spots: list[tuple[RouteAct, Spot]] = field(default_factory=list)
    tensors: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    selected: list[tuple[Any, Tensor, int]] = field(default_factory=list)
    stamp: int = 0
    training: bool = False
    total: int = 0
    counted: list[Tensor] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        """Nothing was written since, as far as counters tell at once."""
        return self.stamp == steps() and self.total == sum(map(VERSION, self.counted))


class Bank(Guest):
    """Everything that routes over one backbone share.

    Attributes:
        records: the deltas in it, by name.
        acts: by the numbers under which plans know them.
        contexts: the acts of virtual tokens and side networks, with where they compute.
        plan: of the route that is open; None outside of routes.
        rows: how many rows it has.
        heads: the acts of the heads that deltas have of their own.
        newest: number of the newest route.
        open: numbers of the routes that are open.
        layers: the modules that gradient checkpointing may compute anew.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.records: dict[str, Record] = {}
        self.acts: dict[int, RouteAct] = {}
        self.contexts: dict[int, Context] = {}
        self._numbers = 0
        self.plan: Plan | None = None
        self.rows = 1
        self.newest = 0
        self.open: list[int] = []
        self.heads: dict[str, list[tuple[RouteAct, nn.Module]]] = {}
        self.lock = Lock()
        self.layers = checkpointing(backbone)

    @property
    def ledger(self) -> Ledger:
        """The backbone's."""
        ledger = ledger_of(self.backbone)
        assert ledger is not None
        return ledger

    def __contains__(self, name: object) -> bool:
        return name in self.records

    def __len__(self) -> int:
        return len(self.records)

    def add(self, name: str) -> None:
        """Enter a delta, or enter it anew if its tensors have changed.

        Raises:
            UnknownName: no delta of that name is attached.
            Unsupported: it cannot act in single rows of a batch.
        """
        with self.lock:
            delta = self.ledger.delta(name)
            record = self.records.get(name)
            if record is None or record.delta is not delta:
                check_routable(delta)
                record = self._placed(delta)
                self.records[name] = record
                self._enter(record)
            elif not self._is_current(record):
                self._enter(record)

    def remove(self, name: str) -> None:
        """Forget a delta's lanes; it stays attached."""
        with self.lock:
            record = self.records.pop(name, None)
            for act, spot in record.spots if record is not None else ():
                act.remove(spot.module, name)
            remove_head(name, self.heads.pop(name, []))

    def forget(self, delta: str) -> None:
        """It is detached: its acts let go of its lanes themselves, but for a head of its own."""
        with self.lock:
            self.records.pop(delta, None)
            remove_head(delta, self.heads.pop(delta, []))

    def head(self, name: str, tensors: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        """Give a delta a task head of its own, with any number of labels; it acts in routes only. See ``multi.heads``.

        Args:
            name: the delta.
            tensors: the head's, under their names below the backbone's head: ``weight`` and ``bias`` where that is one linear map;
                or the folder that it was saved to with its delta, of which ``dt.load(..., head=False)`` takes the rest.

        Raises:
            UnknownName: no delta of that name is attached.
            Unsupported: the backbone has no task head of linear maps.
            InvalidValue: the tensors are not those of such a head.
            CheckpointError: the folder is damaged, or holds no head.
        """
        found = tensors if isinstance(tensors, Mapping) else read_head(self.backbone, tensors)
        with self.lock:
            self.add(name)
            self.heads[name] = place_head(self, name, found)

    @property
    def oldest(self) -> int:
        """Number of the oldest route that is open, or of the next one."""
        return min(self.open, default=self.newest + 1)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the root begins: its batch must be a multiple of the route's rows.

        Raises:
            InvalidValue: it is not.
        """
        if self.plan is None:
            return
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
        batch = next((value.shape[0] for value in values), self.plan.rows)
        if batch % self.plan.rows:
            raise InvalidValue(
                f"A route of {self.plan.rows} rows was open while the backbone was given a batch of {batch}. Give dt.route one entry per "
                "row (generate may repeat each row, as for beams)."
            )
        if not torch.is_grad_enabled():
            self.plan = self._renewed(self.plan)
        if self.backbone.training:
            self.ledger.around.draws.take(self.plan.deltas)

    def planned(self, programs: Sequence[Program], streams: Streams | None = None) -> Plan:
        """Open a route: its deltas entered, and what each module does.

        Args:
            programs: what each row uses.
            streams: whose random numbers each row's dropout takes; None for the global ones.

        Raises:
            Unsupported: a delta cannot act in single rows of a batch.
        """
        names = list(dict.fromkeys(name for program in programs for term in program for name in term.members))
        with self.lock:
            for name in names:
                self.add(name)
            return self._opened(programs, streams)

    def training_plan(self, programs: Sequence[Program], streams: Streams, grounds: Sequence[Ground] = ()) -> Plan:
        """The same for a route of which every delta trains: gradients need the deltas' own tensors, so lanes are not entered anew.

        Args:
            programs: what each row uses.
            streams: whose random numbers each row's dropout takes.
            grounds: where what deltas train lies side by side.
        """
        with self.lock:
            for name in dict.fromkeys(name for program in programs for term in program for name in term.members):
                if name not in self.records:
                    self.add(name)
            return self._opened(programs, streams, grounds)

    def _opened(self, programs: Sequence[Program], streams: Streams | None, grounds: Sequence[Ground] = ()) -> Plan:
        self.newest += 1
        plan = self._plan(self.newest, programs, streams, grounds)
        self.open.append(plan.number)
        return plan

    def close(self, plan: Plan) -> None:
        """A route is over."""
        with self.lock:
            self.open.remove(plan.number)

    def _plan(self, number: int, programs: Sequence[Program], streams: Streams | None = None, grounds: Sequence[Ground] = ()) -> Plan:
        names = dict.fromkeys(name for program in programs for term in program for name in term.members)
        training = frozenset(name for name in names if self.ledger.deltas[name].wants_gradients)
        return Planner(number, programs, self.acts, self.contexts, training, streams, grounds).plan()

    def _renewed(self, plan: Plan) -> Plan:
        """The plan with lanes of now, where an optimizer stepped or a tensor was written since."""
        with self.lock:
            old = [name for name in plan.deltas if name in self.records and not self.records[name].is_quiet]
            for name in old:
                self.add(name)
            return self._plan(plan.number, plan.entries) if old else plan

    def rows_of(self, number: int) -> Any:
        """What the rows do at a context act."""
        return None if self.plan is None else self.plan.contexts.get(number)

    @contextmanager
    def entered(self, plan: Plan | None) -> Iterator[None]:
        """This plan for a moment: while its route is open, and where a backward computes a part of its forward anew."""
        before, rows = self.plan, self.rows
        switch = self.ledger.around.switch if plan is not None and plan.has_prefixes else None
        self.plan, self.rows = plan, 1 if plan is None else plan.rows
        if switch is not None:
            switch.count(1)
        try:
            yield
        finally:
            self.plan, self.rows = before, rows
            if switch is not None:
                switch.count(-1)

    def _placed(self, delta: Delta) -> Record:
        """Put an act at every module the delta touches."""
        record = Record(delta)
        index = self.ledger.index(self.backbone)
        for entry in delta.entries:
            if not any(isinstance(entry.patch, kind) for kind, _ in READERS):
                self._tell(entry)
                continue
            for module, parameter in self._hosts(entry):
                act = self.act_of(module)
                act.add(module, Member(delta.name, entry.site, entry.patch, parameter))
                spot = Spot(delta, entry, module, parameter, len(act.members[delta.name]) - 1)
                act.spots[spot.name] = spot
                record.spots.append((act, spot))
                if isinstance(entry.patch, TokenPatch):
                    act.reads_tokens = True
                if isinstance(entry.patch, BranchPatch | BranchInputPatch) and act.given is None:
                    act.given = Given()
                    self.act_of(index.beginning(entry.site).module).begins.append(act.given)
        return record

    def _tell(self, entry: Entry) -> None:
        """A context act is told by this bank what its rows do."""
        act = context_at(entry.site.module, entry.act)
        if act.number not in self.contexts or self.contexts[act.number].act is not act:
            act.guest, act.number = self, self._numbers
            self._numbers += 1
            self.contexts = {**self.contexts, act.number: Context.of(act, entry.site, self.ledger.index(self.backbone))}

    def _hosts(self, entry: Entry) -> list[tuple[nn.Module, str]]:
        """The modules that run a patch, with what they call its parameter."""
        if not isinstance(entry.patch, SelectionPatch):
            return [(host.module, host.parameter) for host in entry.hosts if host.act is None]
        index = self.ledger.index(self.backbone)
        owners = index.owners(entry.parameter)
        return [index.reader(path.removesuffix(name).rstrip("."), name) for _, name, path in owners]

    def act_of(self, module: nn.Module) -> RouteAct:
        """The act at a module, made if there was none."""
        slot = open_slot(module)
        act = slot.acts.get(RouteAct)
        if isinstance(act, RouteAct):
            return act
        act = add_act(slot, RouteAct(module))
        act.bank, act.number = self, self._numbers
        self._numbers += 1
        self.acts = {**self.acts, act.number: act}
        slot.listen(module)
        return act

    def _enter(self, record: Record) -> None:
        """Read every patch as a lane."""
        record.stamp, record.training = steps(), any(patch.training for patch in record.delta.patches)
        record.tensors = [
            (holder, name, tensor)
            for _, owner in record.delta.holders
            for module in owner.modules()
            for holder in (module._parameters, module._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]
        record.counted = [tensor for _, _, tensor in record.tensors if not tensor.is_inference()]
        record.total = sum(map(VERSION, record.counted))
        record.selected = [_selected(entry) for entry in record.delta.entries if isinstance(entry.patch, SelectionPatch)]
        with torch.no_grad():
            for act, spot in record.spots:
                source = read(spot)
                if source is NOTHING:
                    act.forget(spot.name)
                else:
                    act.enter(spot.name, spot.stage, source, spot.module, spot.reads)

    def _is_current(self, record: Record) -> bool:
        """Nothing the lanes were made from has changed."""
        if record.training != any(patch.training for patch in record.delta.patches):
            return False
        if record.stamp != steps() and any(tensor.requires_grad for _, _, tensor in record.tensors):
            return False
        if any(holder.get(name) is not tensor for holder, name, tensor in record.tensors):
            return False
        if any(
            choice.values.get(record.delta.name) is not value or value._version != version for choice, value, version in record.selected
        ):
            return False
        return record.total == int(sum(map(VERSION, record.counted)))  # versions only grow


def _selected(entry: Entry) -> tuple[Any, Tensor, int]:
    choice = entry.choice
    value = choice.values[entry.delta]
    return choice, value, value._version


def bank(backbone: nn.Module) -> Bank:
    """The bank of a backbone's routed deltas, made if there was none.

    Raises:
        Unsupported: nothing is attached, or the backbone's batches do not run along the first axis.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        raise Unsupported("Nothing is attached to this backbone, so there is nothing to route. Attach or load deltas first.")
    guest = ledger.around.guest
    if isinstance(guest, Bank):
        return guest
    for path, module in backbone.named_modules():
        if getattr(module, "batch_first", True) is False:
            raise Unsupported(
                f"`{path}` ({type(module).__name__}) takes its batch along the second axis (batch_first=False), where rows cannot be "
                "routed. Build it with batch_first=True."
            )
    made = Bank(backbone)
    ledger.around.guest = made
    return made
