"""A company: jobs whose rows can share a forward, from the first that joins to the last that leaves."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.errors import DeltaError, Diverged, Unsupported
from deltatune.multi.together.host import Host, Task
from deltatune.multi.together.planner import ALONE, bins, probe
from deltatune.multi.together.portion import Call
from deltatune.multi.together.shells import Shells, unshare
from deltatune.multi.together.tally import Tally
from deltatune.multi.together.tenant import Batch, Tenant
from deltatune.multi.together.wanted import Wanted
from deltatune.training.arguments import Schedule, training_arguments
from deltatune.training.borrowed import left_alone
from deltatune.training.job import make_job
from deltatune.training.train import conclude

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Member:
    """A job in a company.

    Attributes:
        wanted: what it is to do.
        tenant: the job while it trains.
        stack: what is undone when it leaves.
        form: of its deltas, when plans were last made for them.
    """

    wanted: Wanted
    tenant: Tenant
    stack: ExitStack
    form: tuple[int, ...]


class Company:
    """Trains jobs whose forwards can be joined.

    Args:
        shells: of the backbone.
        wanted: the jobs.
        tokenizer: of the backbone.
        tally: shows how far they are.
        at_once: most jobs at the same time.
        tokens: most tokens of a shared forward; None lets a probe find out.
    """

    def __init__(
        self, shells: Shells, wanted: Sequence[Wanted], tokenizer: PreTrainedTokenizerBase, tally: Tally, at_once: int, tokens: int | None
    ) -> None:
        self.shells, self.tokenizer, self.tally = shells, tokenizer, tally
        self.at_once, self.tokens = at_once, tokens
        self.waiting = list(wanted)
        shells.host = None
        self.members: list[Member] = []
        self.host: Host | None = None
        self._probed = 0
        self._size = ALONE if tokens is None else tokens

    def train(self) -> None:
        """Until the last job has left."""
        try:
            while self.waiting or self.members:
                while self.waiting and len(self.members) < self.at_once:
                    self.join(self.waiting.pop(0))
                if self.members:
                    self.round()
        except BaseException as error:
            for member in self.members:
                member.stack.__exit__(type(error), error, error.__traceback__)
            raise

    def join(self, wanted: Wanted) -> None:
        """Make a job's shell and delta, and let it go on where it stands."""
        stack = ExitStack()
        try:
            member = self._made(wanted, stack)
        except Unsupported as error:
            stack.close()
            wanted.outcome.apart = str(error)
            self.tally.say(f"{wanted.name} will be trained by itself: {error}")
            return
        except DeltaError as error:
            stack.__exit__(type(error), error, error.__traceback__)
            wanted.outcome.error = error
            self.tally.say(f"{wanted.name} cannot begin: {error}")
            return
        except BaseException as error:
            stack.__exit__(type(error), error, error.__traceback__)
            raise
        self.members.append(member)
        self.tally.begin(member.tenant)
        with ExitStack() as own:
            own.push(lambda kind, error, _: self._failed(member, error))
            member.tenant.begin()
            if member.tenant.is_over:
                self._leave(member)

    def _made(self, wanted: Wanted, stack: ExitStack) -> Member:
        settings, place = wanted.job.settings, wanted.place
        job = make_job(
            self.shells.open(), wanted.data, wanted.job.methods, wanted.job.where, wanted.job.layers, settings, self.tokenizer,
            self.shells.load,
        )  # fmt: skip
        if not job.trains:
            raise Unsupported(f"Nothing of `{wanted.name}` trains: it is only scored.")
        for delta in job.deltas:
            unshare(delta)
        stack.enter_context(left_alone(job.backbone, job.trained))
        material = job.material(settings)
        folder = place.checkpoints if place else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltatune-")))
        schedule = Schedule.of(settings, len(material.kept), resumable=place is not None)
        tenant = Tenant(job, material, settings, training_arguments(settings, schedule, folder, job.lr))
        if self.host is None:
            assert self.shells.host is not None
            self.host = Host(self.shells.host, int(self.tokenizer.pad_token_id or 0), bf16=settings.bf16)
        self.host.admit(tenant)
        stack.callback(self.host.dismiss, tenant)
        if place is not None:
            stack.push(lambda kind, *_: None if kind is None else place.abandon(resumable=not issubclass(kind, Diverged)))
            place.open()
        return Member(wanted, tenant, stack, tenant.form)

    def _failed(self, member: Member, error: BaseException | None) -> bool:
        """A job that fails leaves alone; True if that is all."""
        if not isinstance(error, DeltaError):
            return False
        if member in self.members:
            self.members.remove(member)
            self.tally.leave(member.tenant)
        member.stack.__exit__(type(error), error, error.__traceback__)
        member.wanted.outcome.error = error
        self.tally.say(f"{member.wanted.name} stopped: {error}")
        return True

    def round(self) -> None:
        """One step of every job."""
        began = time.perf_counter()
        taking = sorted(self.members, key=lambda member: member.tenant.row)  # as they lie side by side
        batches: dict[int, list[Batch]] = {}
        for member in taking:
            batches[id(member)] = member.tenant.next()
            self._watch(member)
        held = {id(member): member.tenant.stream.held for member in taking}
        losses = self._computed(taking, batches)
        shares = {id(member): sum(batch["labels"].shape[0] for batch in batches[id(member)]) for member in taking}
        seconds = (time.perf_counter() - began) / max(sum(shares.values()), 1)
        for member in taking:
            member.tenant.seconds.append(seconds * shares[id(member)])
            with ExitStack() as own:
                own.push(lambda kind, error, _, member=member: self._failed(member, error))
                self._step(member, batches[id(member)], losses[id(member)], held[id(member)])
                if member.tenant.is_over:
                    self._leave(member)
        self.tally.step([member.tenant for member in taking])

    def _watch(self, member: Member) -> None:
        """A phase may have given its deltas another form."""
        if member.tenant.form != member.form:
            assert self.host is not None
            member.form = member.tenant.form
            self.host.renew(member.tenant)

    def _computed(self, taking: Sequence[Member], batches: dict[int, list[Batch]]) -> dict[int, Tensor]:
        """Forwards and backwards of one step of each; the sum of each one's losses."""
        losses = {id(member): torch.zeros((), device=member.tenant.device) for member in taking}
        for turn in range(max(map(len, batches.values()), default=0)):
            sharing = [member for member in taking if turn < len(batches[id(member)])]
            tasks = [Task(member.tenant, batches[id(member)][turn]) for member in sharing]
            for member, loss in zip(sharing, self._shared(tasks, probes=not turn), strict=True):
                losses[id(member)] += loss
        return losses

    def _shared(self, tasks: Sequence[Task], *, probes: bool) -> list[Tensor]:
        """One batch of each; the losses. A probe needs a moment without gradients."""
        if len(tasks) == 1 or self.tokens == ALONE:
            return [task.tenant.alone([task.batch]) for task in tasks]
        assert self.host is not None
        calls = [self.host.call(task) for task in tasks]
        if probes and self.tokens is None and not self._probed // 2 < len(tasks) <= 2 * self._probed:
            self._size, self._probed = self._probe(tasks, calls), len(tasks)
        if self._size == ALONE:
            return [task.tenant.alone([task.batch]) for task in tasks]
        losses: list[Tensor] = [torch.empty(0)] * len(tasks)
        for numbers in bins(calls, self._size):
            found = self._run([tasks[k] for k in numbers], [calls[k] for k in numbers])
            for k, loss in zip(numbers, found, strict=True):
                losses[k] = loss
        return losses

    def _probe(self, tasks: Sequence[Task], calls: Sequence[Call]) -> int:
        """How large a shared forward shall be from now on."""
        assert self.host is not None
        try:
            return probe(self.host, tasks, calls)
        except Unsupported as error:
            self._give_up(error)
            for task in tasks:
                task.tenant.forget()
            return ALONE

    def _give_up(self, error: Unsupported) -> None:
        """The backbone turns out to allow no sharing."""
        self.tally.say(f"The jobs go on one by one: {error}")
        self.tokens = ALONE

    def _run(self, tasks: Sequence[Task], calls: Sequence[Call]) -> list[Tensor]:
        """One forward; where it cannot be shared, everybody goes on alone."""
        assert self.host is not None
        held = [task.tenant.stream.held for task in tasks]
        try:
            return self.host.run(tasks, calls)
        except Unsupported as error:
            self._give_up(error)
            for task, before in zip(tasks, held, strict=True):
                task.tenant.stream.held = before
            return [task.tenant.alone([task.batch]) for task in tasks]

    def _step(self, member: Member, batches: list[Batch], loss: Tensor, held: dict[str, object]) -> None:
        """Let one job take its step; numbers that are not finite are computed anew alone, to know whose fault they are."""
        tenant = member.tenant
        assert self.host is not None
        self.host.settle(tenant)
        norm = tenant.norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            tenant.forget()
            tenant.stream.held = held
            loss = tenant.alone(batches)
            norm = tenant.norm()
        tenant.step(loss, norm)

    def _leave(self, member: Member) -> None:
        """A job is over: its delta in its final form, scored and saved."""
        wanted, tenant = member.wanted, member.tenant
        assert self.host is not None
        course = tenant.conclude()
        result = conclude(tenant.job, wanted.run, wanted.place, course, "none")
        self.members.remove(member)
        self.tally.leave(tenant)
        member.stack.close()
        wanted.outcome.result, wanted.outcome.numbers = result, result.to_json()
