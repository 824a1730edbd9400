"""The bank of a backbone: the lanes of all deltas that were routed, and the plans of routes over them.

A delta enters when a route first names it, or by ``add``, and is entered anew when its tensors have changed. Tables are
replaced or extended where nobody reads, so one thread may add and remove deltas while another one computes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.heads import read_head
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.around import Guest
from deltatune.injection.attach import add_act
from deltatune.injection.entries import Entry
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.slot import open_slot
from deltatune.methods.kinds import BranchInputPatch, BranchPatch, SelectionPatch
from deltatune.multi.act import RouteAct
from deltatune.multi.contexts import Context, context_at
from deltatune.multi.heads import place_head, remove_head
from deltatune.multi.lock import Lock
from deltatune.multi.opened import Opened, busy
from deltatune.multi.plan import Plan, Program, names_of
from deltatune.multi.planning import Planner
from deltatune.multi.reading import READERS, Spot, check_routable
from deltatune.multi.recompute import checkpointing
from deltatune.multi.record import Record

if TYPE_CHECKING:
    from deltatune.multi.ground import Ground
    from deltatune.multi.streams import Streams


class Bank(Guest):
    """Everything that routes over one backbone share.

    Attributes:
        records: the deltas in it, by name.
        acts: by the numbers under which plans know them.
        contexts: the acts of virtual tokens and side networks, with where they compute.
        opened: its routes.
        heads: the acts of the heads that deltas have of their own.
        layers: the modules that gradient checkpointing may compute anew.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.records: dict[str, Record] = {}
        self.acts: dict[int, RouteAct] = {}
        self.contexts: dict[int, Context] = {}
        self._numbers = 0
        self.heads: dict[str, list[tuple[RouteAct, nn.Module]]] = {}
        self.lock = Lock()
        self.opened = Opened(self.ledger.around, self.lock)
        self.layers = checkpointing(backbone)
        self._detached = 0

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
            self._add(name)

    def _add(self, name: str) -> bool:
        """Enter it, all of it or nothing; False where its lanes are what it is."""
        delta = self.ledger.delta(name)
        if name in self.records:
            return self.records[name].enter()
        check_routable(delta)
        record = Record(delta)
        try:
            self._place(record)
            record.enter()
        except BaseException:
            record.leave()
            raise
        self.records[name] = record
        return True

    def remove(self, name: str) -> None:
        """Forget a delta's lanes; it stays attached, and a route that is open keeps it."""
        with self.lock:
            record = self.records.pop(name, None)
            if record is not None:
                record.leave()
            remove_head(name, self.heads.pop(name, []))

    def forget(self, delta: str) -> None:
        """It is detached: its acts let go of its lanes themselves, but for a head of its own."""
        with self.lock:
            self.records.pop(delta, None)
            remove_head(delta, self.heads.pop(delta, []))
            self.contexts = {number: own for number, own in self.contexts.items() if own.act.members.keys() - {delta}}
            self._detached = self.opened.newest

    def refresh(self) -> None:
        """Tensors were written in ways that no counter tells: every lane is read anew before it is used."""
        with self.lock:
            for record in self.records.values():
                record.entered = None

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

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the root begins: its batch must be a multiple of the route's rows.

        Raises:
            Busy: another thread opened the route.
            InvalidValue: it is not.
            Unsupported: a delta of the route was detached.
        """
        plan = self.opened.plan
        if plan is None:
            return
        if not self.opened.is_own:
            raise busy()
        if plan.number <= self._detached:
            self.check(plan)
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
        batch = next((value.shape[0] for value in values), plan.rows)
        if batch % plan.rows:
            raise InvalidValue(
                f"A route of {plan.rows} rows was open while the backbone was given a batch of {batch}. Give dt.route one entry per "
                "row (generate may repeat each row, as for beams)."
            )
        if not torch.is_grad_enabled() or plan.training != self.backbone.training:
            self.opened.plan = plan = self._renewed(plan)
        if self.backbone.training:
            self.ledger.around.draws.take(plan.deltas)

    def check(self, plan: Plan) -> None:
        """Every delta of a plan is still there.

        Raises:
            Unsupported: one was detached since its route was opened.
        """
        gone = [name for name in plan.deltas if name not in self.ledger.deltas]
        if gone:
            raise Unsupported(
                f"Delta `{gone[0]}` was detached while a route that names it was open. Detach it behind the route, and behind the backward "
                "of what it computed."
            )

    def planned(
        self, programs: Sequence[Program], streams: Streams | None = None, grounds: Sequence[Ground] = (), *, own_only: bool = False
    ) -> Plan:
        """Open a route: its deltas entered, and what each module does.

        Args:
            programs: what each row uses.
            streams: whose random numbers each row's dropout takes; None for the global ones.
            grounds: where what deltas train lies side by side.
            own_only: every delta trains, and gradients need its own tensors, so that lanes which are there are not entered anew.

        Raises:
            Unsupported: a delta cannot act in single rows of a batch.
        """
        with self.lock:
            for name in names_of(programs):
                if not own_only or name not in self.records:
                    self._add(name)
            self.opened.newest += 1
            plan = self._plan(self.opened.newest, programs, streams, grounds)
            self.opened.numbers.append(plan.number)
            return plan

    def _plan(self, number: int, programs: Sequence[Program], streams: Streams | None = None, grounds: Sequence[Ground] = ()) -> Plan:
        training = frozenset(name for name in names_of(programs) if self.ledger.deltas[name].wants_gradients)
        plan = Planner(number, programs, self.acts, self.contexts, training, streams, grounds).plan()
        return replace(plan, training=self.backbone.training)

    def _renewed(self, plan: Plan) -> Plan:
        """The plan with lanes of now, where an optimizer stepped or a tensor was written since; what was removed comes back then."""
        with self.lock:
            records = self.records
            if all(name not in records or records[name].is_quiet for name in plan.deltas) and plan.training == self.backbone.training:
                return plan
            entered = [self._add(name) for name in plan.deltas]
            return self._plan(plan.number, plan.entries) if any(entered) or plan.training != self.backbone.training else plan

    def rows_of(self, number: int) -> Any:
        """What the rows do at a context act."""
        return None if self.opened.plan is None else self.opened.plan.contexts.get(number)

    def _place(self, record: Record) -> None:
        """Put an act at every module the delta touches."""
        delta, index = record.delta, self.ledger.index(self.backbone)
        for entry in delta.entries:
            if not any(isinstance(entry.patch, kind) for kind, _ in READERS):
                self._tell(entry)
                continue
            for module, parameter in self._hosts(entry):
                act = self.act_of(module)
                spot = Spot(delta, entry, module, parameter, act.tables.next_number(delta.name))
                record.spots.append((act, spot))
                act.place(spot)
                if isinstance(entry.patch, BranchPatch | BranchInputPatch):
                    first = index.beginning(entry.site).module
                    record.begins.append((self.act_of(first), first))
                    record.begins[-1][0].begin(first, spot, act)

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
        act = add_act(slot, RouteAct(module, self, self._numbers))
        self._numbers += 1
        self.acts = {**self.acts, act.number: act}
        slot.listen(module)
        return act


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
