"""A company: jobs whose rows can share a forward, from the first that joins to the last that leaves."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltatune.errors import DeltaError, Diverged, Halt, Unsupported
from deltatune.multi.together.host import Host, Task
from deltatune.multi.together.portion import Call
from deltatune.multi.together.sharing import ALONE, bins, probe
from deltatune.multi.together.shells import Shells, unshare
from deltatune.multi.together.tally import Tally
from deltatune.multi.together.tenant import Tenant
from deltatune.multi.together.updates import Batch
from deltatune.multi.together.wanted import Wanted
from deltatune.training.arguments import Schedule, training_arguments
from deltatune.training.borrowed import left_alone
from deltatune.training.job import make_job
from deltatune.training.train import conclude

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
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
        self._repeated = 0
        self._doubt: Exception | None = None
        self._size = ALONE if tokens is None else tokens

    def train(self) -> None:
        """Until the last job has left."""
        try:
            while self.waiting or self.members:
                while self.waiting and len(self.members) < self.at_once:
                    self.join(self.waiting.pop(0))
                if self.members:
                    self.round()
            if self._repeated:
                self.tally.say(f"{self._repeated} batches were computed a second time, alone: together they failed, or were not finite.")
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
        except BaseException as error:
            stack.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, Halt) or not isinstance(error, Exception):
                raise
            wanted.outcome.error = error
            self.tally.say(f"{wanted.name} cannot begin: {_said(error)}")
            return
        self.members.append(member)
        self.tally.begin(member.tenant)
        with self._by_itself(member):
            member.tenant.begin()
            if member.tenant.logbook.is_over:
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

    @contextmanager
    def _by_itself(self, member: Member) -> Iterator[None]:
        """What one job does by itself; if it fails, it leaves, and the others go on."""
        try:
            yield
        except Halt:
            raise
        except Exception as error:
            if member in self.members:
                self.members.remove(member)
                self.tally.leave(member.tenant)
            member.stack.__exit__(type(error), error, error.__traceback__)
            member.wanted.outcome.error = error
            self.tally.say(f"{member.wanted.name} stopped: {_said(error)}")

    def round(self) -> None:
        """One step of every job."""
        began = time.perf_counter()
        batches: dict[int, list[Batch]] = {}
        for member in sorted(self.members, key=lambda member: member.tenant.row):  # as they lie side by side
            with self._by_itself(member):
                batches[id(member)] = member.tenant.next()
                self._watch(member)
        taking = sorted(self.members, key=lambda member: member.tenant.row)
        held = {id(member): member.tenant.stream.held for member in taking}
        losses = self._computed(taking, batches)
        taking = [member for member in taking if member in self.members]
        shares = {id(member): sum(batch["labels"].shape[0] for batch in batches[id(member)]) for member in taking}
        seconds = (time.perf_counter() - began) / max(sum(shares.values()), 1)
        for member in taking:
            member.tenant.seconds.append(seconds * shares[id(member)])
            with self._by_itself(member):
                self._step(member, batches[id(member)], losses[id(member)], held[id(member)])
                if member.tenant.logbook.is_over:
                    self._leave(member)
        if taking:
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
            sharing = {
                member: Task(member.tenant, batches[id(member)][turn])
                for member in taking
                if member in self.members and turn < len(batches[id(member)])
            }
            for member, loss in self._shared(sharing, probes=not turn).items():
                losses[id(member)] += loss
        return losses

    def _shared(self, sharing: Mapping[Member, Task], *, probes: bool) -> dict[Member, Tensor]:
        """One batch of each; the losses. A probe needs a moment without gradients."""
        if len(sharing) == 1 or self.tokens == ALONE:
            return self._one_by_one(sharing)
        assert self.host is not None
        asked: dict[Member, Call] = {}
        for member, task in sharing.items():
            with self._by_itself(member):
                asked[member] = self.host.call(task)
        members, tasks, calls = list(asked), [sharing[member] for member in asked], list(asked.values())
        if len(asked) < 2:
            return self._one_by_one(dict(zip(members, tasks, strict=True)))
        if probes and self.tokens is None and not self._probed // 2 < len(tasks) <= 2 * self._probed:
            self._probe(tasks, calls)
        if self._size == ALONE:
            return self._told_apart(dict(zip(members, tasks, strict=True)))
        losses: dict[Member, Tensor] = {}
        for numbers in bins(calls, self._size):
            losses |= self._run({members[k]: tasks[k] for k in numbers}, [calls[k] for k in numbers])
        return losses

    def _one_by_one(self, sharing: Mapping[Member, Task]) -> dict[Member, Tensor]:
        """Each on its own shell; those that fail are left out."""
        losses: dict[Member, Tensor] = {}
        for member, task in sharing.items():
            with self._by_itself(member):
                losses[member] = task.tenant.alone([task.batch])
        return losses

    def _told_apart(self, sharing: Mapping[Member, Task]) -> dict[Member, Tensor]:
        """Each on its own shell; where an error made that necessary and nobody has it there, nothing is shared from now on."""
        losses, (doubt, self._doubt) = self._one_by_one(sharing), (self._doubt, None)
        if doubt is not None and len(losses) == len(sharing):
            self._give_up(doubt)
        return losses

    def _probe(self, tasks: Sequence[Task], calls: Sequence[Call]) -> None:
        """Find out how large a shared forward shall be from now on; where a job fails meanwhile, that is asked again without it."""
        assert self.host is not None
        held = [task.tenant.stream.held for task in tasks]
        try:
            self._size, self._probed = probe(self.host, tasks, calls), len(tasks)
            return
        except Exception as error:
            self._note(error)
        self._size = ALONE
        for task, before in zip(tasks, held, strict=True):
            task.tenant.forget()
            task.tenant.stream.held = before

    def _give_up(self, error: Exception) -> None:
        """The backbone turns out to allow no sharing."""
        self.tally.say(f"The jobs go on one by one: {_said(error)}")
        self.tokens = ALONE

    def _note(self, error: Exception) -> None:
        """A shared forward failed; by whose fault turns out where each is computed alone. What is from outside, or half done, is all's."""
        assert self.host is not None
        if isinstance(error, Halt) or self.host.in_backward:
            raise error
        if isinstance(error, Unsupported):
            self._give_up(error)
        else:
            self._doubt = error

    def _run(self, sharing: Mapping[Member, Task], calls: Sequence[Call]) -> dict[Member, Tensor]:
        """One forward; where it cannot be shared, everybody goes on alone."""
        assert self.host is not None
        tasks = list(sharing.values())
        held = [task.tenant.stream.held for task in tasks]
        try:
            return dict(zip(sharing, self.host.run(tasks, calls), strict=True))
        except Exception as error:
            self._note(error)
        self._repeated += len(tasks)
        for task, before in zip(tasks, held, strict=True):
            task.tenant.stream.held = before
        return self._told_apart(sharing)

    def _step(self, member: Member, batches: list[Batch], loss: Tensor, held: dict[str, object]) -> None:
        """Let one job take its step; numbers that are not finite are computed anew alone, to know whose fault they are."""
        tenant = member.tenant
        assert self.host is not None
        self.host.check_reached(tenant)
        if self.tokens != ALONE:  # a backbone that may skip layers leaves gradients out, which a row of a ground cannot
            self.host.settle(tenant)
        norm = tenant.norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            tenant.forget()
            tenant.stream.held = held
            self._repeated += len(batches)
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


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, DeltaError) else f"{type(error).__name__}: {error}"
