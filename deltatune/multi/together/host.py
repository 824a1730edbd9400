"""The host: one tree in which the rows of many tenants run forward and backward together, each row with its tenant's delta."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltatune.errors import Unsupported
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.lending import lend, reclaim
from deltatune.injection.prompt import PromptAct
from deltatune.injection.rows import RowPrefixes, RowPrompts, RowTokens
from deltatune.injection.slot import Term
from deltatune.injection.watch import has_fired, idle
from deltatune.methods.kinds import ConditionalPrefixPatch, Patch, PrefixPatch, PromptPatch
from deltatune.methods.lanes import Laned
from deltatune.multi.bank import Bank, bank
from deltatune.multi.ground import Ground
from deltatune.multi.plan import Plan, Program
from deltatune.multi.reading import check_routable
from deltatune.multi.streams import Block, Places, Streams, drawing_nothing
from deltatune.multi.together.portion import Call, Joined, Portion
from deltatune.multi.together.tenant import Tenant
from deltatune.multi.together.updates import Batch

PLANS = 64
"""So many plans are kept: jobs meet in the same company again."""


@dataclass
class Lodging:
    """What the host keeps for one tenant.

    Attributes:
        number: of the tenant; its twins' names begin with it.
        twins: its deltas here.
        draws: its patches drop entries.
        unseen: patches of its twins of which is not known yet whether a forward reaches them.
        has_run: a forward with its rows is through.
        hooks: that tell whose prefix is being made.
    """

    number: int
    twins: list[Delta]
    draws: bool
    unseen: list[Entry] = field(default_factory=list)
    has_run: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def program(self) -> Program:
        """What acts in its rows."""
        return tuple(Term("sequential", (twin.name,), (1.0,)) for twin in self.twins)


@dataclass(frozen=True)
class Task:
    """One batch of one tenant."""

    tenant: Tenant
    batch: Batch


class Host:
    """Runs batches of several tenants at once.

    Args:
        tree: a shell in which nothing acts outside of routes.
        pad: the id that fills up shorter rows.
        bf16: forwards run in bfloat16 where that is safe.

    Attributes:
        in_backward: a backward has begun and has not ended: gradients are half there.
    """

    def __init__(self, tree: nn.Module, pad: int, *, bf16: bool = False) -> None:
        self.tree, self.pad, self.bf16 = tree, pad, bf16
        self.portion = Portion(tree)
        self._lodgings: dict[int, Lodging] = {}
        self._plans: dict[tuple[tuple[int, int], ...], tuple[Plan, Streams]] = {}
        self._grounds: dict[Hashable, Ground] = {}
        self._numbers = 0
        self.in_backward = False
        self._in_batch: list[Lodging] = []
        self._current: Streams | None = None
        self._bank: Bank | None = None
        self._draws = any(map(_drops, tree.modules()))

    def admit(self, tenant: Tenant) -> None:
        """Take in a tenant's deltas; its modules are those of the tree, and its frozen tensors the same.

        Raises:
            Unsupported: a delta cannot act in single rows of a batch, or draws its dropout for all rows at once.
        """
        check_shared(tenant)
        self._numbers += 1
        lodging = Lodging(self._numbers, [], any(_share(patch) for delta in tenant.job.deltas for patch in delta.patches))
        try:
            for k, delta in enumerate(tenant.job.deltas):
                lodging.twins.append(lend(delta, self.tree, f"job-{self._numbers}-{k}"))
            self._check_rows(lodging)
        except BaseException:
            for twin in lodging.twins:
                reclaim(twin)
            raise
        lodging.unseen = [entry for twin in lodging.twins for entry in twin.entries if entry.act.listens]
        self._bank = bank(self.tree)
        self._lodgings[id(tenant)] = lodging
        patches = [patch for delta in tenant.job.deltas for patch in delta.patches if _makes_tokens(patch) and _share(patch)]
        for patch in patches:
            lodging.hooks += [
                patch.register_forward_pre_hook(lambda *_: self._own(lodging)),
                patch.register_forward_hook(lambda *_: self._own(None), always_call=True),
            ]
        self.tree.train()
        self.refresh()

    def _check_rows(self, lodging: Lodging) -> None:
        """Nothing that the backbone computes once for all rows drops entries.

        Raises:
            Unsupported: something may.
        """
        if self._draws and any(not site.routable for site in lodging.twins[0].ledger.index(self.tree).sites):
            raise Unsupported("The backbone drops entries of what it computes once for all rows, where no job is told apart.")

    def check_reached(self, tenant: Tenant) -> None:
        """The shared forwards so far called every module at which a tenant's patches sit.

        Raises:
            Idle: they did not.
        """
        lodging = self._lodgings[id(tenant)]
        if lodging.unseen and lodging.has_run:
            silent, lodging.unseen = [entry for entry in lodging.unseen if not has_fired(entry)], []
            if silent:
                own = next(delta for delta, twin in zip(tenant.job.deltas, lodging.twins, strict=True) if twin.name == silent[0].delta)
                raise idle(own.name, [entry for entry in silent if entry.delta == silent[0].delta])

    def settle(self, tenant: Tenant) -> None:
        """Let what a tenant trains lie beside what others do, as soon as it can."""
        if tenant.wants_ground:
            tenant.settle(self._grounds)
            self.refresh()

    def dismiss(self, tenant: Tenant) -> None:
        """Let a tenant's deltas go; nothing of them stays."""
        tenant.release()
        self._grounds = {shape: ground for shape, ground in self._grounds.items() if ground.settlers}
        lodging = self._lodgings.pop(id(tenant))
        self.refresh()
        for hook in lodging.hooks:
            hook.remove()
        for twin in lodging.twins:
            reclaim(twin)

    def renew(self, tenant: Tenant) -> None:
        """A tenant's deltas have taken another form."""
        self.refresh()
        for twin in self._lodgings[id(tenant)].twins:
            assert self._bank is not None
            self._bank.remove(twin.name)

    def refresh(self) -> None:
        """Deltas have come or gone: plans are made anew."""
        for plan, _ in self._plans.values():
            assert self._bank is not None
            self._bank.opened.close(plan)
        self._plans.clear()

    def _own(self, lodging: Lodging | None) -> None:
        """The prefixes of a lodging are being made; None: they are made."""
        if self._current is not None:
            numbers = [None if lodging is None else k for k, own in enumerate(self._in_batch) if own is lodging]
            self._current.owned(numbers[0] if numbers else None)

    def call(self, task: Task) -> Call:
        """What a tenant asks of the backbone for one batch."""
        return self.portion.ask(lambda model: task.tenant.loss(model, task.batch))

    def run(self, tasks: Sequence[Task], calls: Sequence[Call]) -> list[Tensor]:
        """Forward and backward of batches whose calls can be joined; each one's loss. Gradients are added to what is there.

        A tenant whose loss is not finite gets no gradients, and the others get theirs as if it were not there.
        """
        before = [task.tenant.stream.held for task in tasks]
        losses = self._forward(tasks, calls)
        whole = torch.stack(losses).isfinite().tolist()
        if all(whole):
            self._backward()
            return [loss.detach() for loss in losses]
        for task, held in zip(tasks, before, strict=True):
            task.tenant.stream.held = held
        fine = [k for k, is_whole in enumerate(whole) if is_whole]
        again = iter(self.run([tasks[k] for k in fine], [calls[k] for k in fine]) if fine else ())
        return [next(again) if is_whole else loss.detach() for loss, is_whole in zip(losses, whole, strict=True)]

    def _forward(self, tasks: Sequence[Task], calls: Sequence[Call]) -> list[Tensor]:
        plan, streams = self._planned(tasks, calls)
        lodgings = [self._lodgings[id(task.tenant)] for task in tasks]
        joined, places = Joined(calls, self.pad), None  # type: tuple[Joined, Places | None]
        if self._draws or any(lodging.draws for lodging in lodgings):
            joined, places = self._joined(calls, plan)
        assert self._bank is not None
        for task in tasks:
            task.tenant.draw()
        self._in_batch, self._current = lodgings, streams
        try:
            own = drawing_nothing(torch.device(self._device)) if places is None else streams.running(places)
            with self._bank.opened.entered(plan), torch.autocast(self._device, torch.bfloat16, enabled=self.bf16), own:
                self._logits = self.tree(**joined.inputs()).logits
        finally:
            self._in_batch, self._current = [], None
        for lodging in lodgings:
            lodging.has_run = True
        self._leaf = self._logits.detach().requires_grad_()
        losses = []
        for task, part in zip(tasks, joined.parts(self._leaf, [_width(task.tenant) for task in tasks]), strict=True):
            self.portion.logits = part
            losses.append(task.tenant.loss(self.portion, task.batch))
        self.portion.logits = None
        self._losses = losses
        return losses

    def _backward(self) -> None:
        """From each loss to its own logits, then through the backbone at once."""
        self.in_backward = True
        torch.autograd.backward(self._losses)
        torch.autograd.backward(self._logits, self._leaf.grad)
        self.in_backward = False
        self._losses = []
        del self._logits, self._leaf

    @property
    def _device(self) -> str:
        return next(parameter.device.type for parameter in self.tree.parameters())

    def _planned(self, tasks: Sequence[Task], calls: Sequence[Call]) -> tuple[Plan, Streams]:
        key = tuple((self._lodgings[id(task.tenant)].number, call.rows) for task, call in zip(tasks, calls, strict=True))
        if key not in self._plans:
            assert self._bank is not None
            blocks, start = [], 0
            for task, call in zip(tasks, calls, strict=True):
                blocks.append(Block(start, start + call.rows, task.tenant.stream))
                start += call.rows
            streams = Streams(blocks)
            programs = [self._lodgings[id(task.tenant)].program for task, call in zip(tasks, calls, strict=True) for _ in range(call.rows)]
            if len(self._plans) >= PLANS:
                plan, _ = self._plans.pop(next(iter(self._plans)))
                self._bank.opened.close(plan)
            self._plans[key] = self._bank.planned(programs, streams, tuple(self._grounds.values()), own_only=True), streams
        return self._plans[key]

    def _joined(self, calls: Sequence[Call], plan: Plan) -> tuple[Joined, Places]:
        """The joined call, a little longer where axes of text and target would be mistaken for each other."""
        for extra in sorted(product(range(4), range(4)), key=sum):
            joined = Joined(calls, self.pad, extra)
            places = self._places(joined, plan)
            if places is not None:
                return joined, places
        raise Unsupported("The tokens of a joined batch could not be told apart by their number. Train its jobs apart (`tokens=0`).")

    def _places(self, joined: Joined, plan: Plan) -> Places | None:
        """Which tokens are each job's own; None where one length means two things."""
        starts = [sum(joined.sizes[:k]) for k in range(len(joined.calls))]
        prompts, prefixes = self._virtual(plan)
        places = Places()
        for target in (False, True):
            length = joined.length(target=target)
            if not length:
                continue
            own = [call.length(target=target) for call in joined.calls]
            prompt = prompts.get(target)
            for ahead in {None, prompt}:
                if not places.enter(places.hidden, _own_places(own, length, starts, ahead, None)):
                    return None
            for prefix in (None, *prefixes):
                if not places.enter(places.keys, _own_places(own, length, starts, prompt, prefix)):
                    return None
        return places

    def _virtual(self, plan: Plan) -> tuple[dict[bool, Ahead], list[Ahead]]:
        """The prompts of text and target, and the different prefixes."""
        assert self._bank is not None
        stacks = [stack.site.path for stack in self._bank.ledger.index(self.tree).stacks]
        prompts: dict[bool, Ahead] = {}
        prefixes: dict[Ahead, None] = {}
        for number, rows in plan.contexts.items():
            context = self._bank.contexts[number]
            if isinstance(rows, RowPrompts):
                prompts[stacks[0] != context.stack] = Ahead.of(rows, behind=isinstance(context.act, PromptAct) and context.act.fills_behind)
            elif isinstance(rows, RowPrefixes):
                prefixes[Ahead.of(rows)] = None
        return prompts, list(prefixes)


@dataclass(frozen=True)
class Ahead:
    """Virtual tokens ahead of the text.

    Attributes:
        length: of all rows, hidden ones included.
        own: of each row.
        behind: hidden ones stand behind the text instead.
    """

    length: int
    own: tuple[int, ...]
    behind: bool = False

    @classmethod
    def of(cls, rows: RowTokens, *, behind: bool = False) -> Ahead:
        """What a route says of them."""
        return cls(rows.length, tuple(rows.shape[0][chosen] for chosen in rows.chosen.tolist()), behind)


NONE = Ahead(0, ())


def _own_places(
    own: Sequence[int], length: int, starts: Sequence[int], prompt: Ahead | None, prefix: Ahead | None
) -> tuple[int, tuple[Tensor, ...]]:
    """Length of [prefix; prompt; text], and which of it belongs to each job, of ``own`` tokens of text and rows from ``starts`` on."""
    E, P = (prompt or NONE).length, (prefix or NONE).length
    found = []
    for tokens, row in zip(own, starts, strict=True):
        e, p = prompt.own[row] if prompt else 0, prefix.own[row] if prefix else 0
        first = P if prompt and prompt.behind else P + E - e
        found.append(torch.tensor([*range(P - p, P), *range(first, first + e + tokens)], dtype=torch.long))
    return P + E + length, tuple(found)


def _width(tenant: Tenant) -> int | None:
    return tenant.job.framing.outputs


def _makes_tokens(patch: Patch) -> bool:
    return isinstance(patch, PrefixPatch | ConditionalPrefixPatch | PromptPatch)


def _share(patch: Patch) -> float:
    """The largest share that something in a patch drops."""
    found = [getattr(module, "dropout", 0.0) for module in patch.modules()]
    found += [module.p for module in patch.modules() if isinstance(module, nn.Dropout)]
    return max((share for share in found if isinstance(share, float)), default=0.0)


def _drops(module: nn.Module) -> bool:
    """The module, or its config, has a setting above 0 that names dropout: attentions drop without a module, and layers are left out."""
    config = getattr(module, "config", None)
    settings = {**vars(module), **({} if config is None else vars(config))}
    named = any(isinstance(value, float) and value > 0 for name, value in settings.items() if "drop" in name)
    return named or (isinstance(module, nn.Dropout) and module.p > 0)


def check_shared(tenant: Tenant) -> None:
    """The tenant can share a forward.

    Raises:
        Unsupported: it cannot, with the reason.
    """
    for delta in tenant.job.deltas:
        check_routable(delta)
        for patch in delta.patches:
            laned = isinstance(patch, Laned) and patch.lane() is not None
            if _share(patch) and not (laned or _makes_tokens(patch)):
                raise Unsupported(
                    f"`{delta.name}` drops entries inside a patch that runs for all rows at once, where no job is told apart."
                )
