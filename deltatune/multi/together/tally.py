"""What many jobs show while they train: one bar over all their steps, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.progress import TaskID

from deltatune.multi.together.tenant import Tenant
from deltatune.training.watch import SECONDS, Show, is_bar, progress_bar, speed


class Tally:
    """Counts the steps of all jobs.

    Args:
        jobs: how many there are.
        show: how.
        file: where to; standard error if left out, so that output can be piped.
    """

    def __init__(self, jobs: int, show: Show, file: TextIO | None = None) -> None:
        self.jobs, self.show = jobs, show
        self.file = sys.stderr if file is None else file
        self.over, self.total, self.done = 0, 0, 0
        self._rows = 0
        self._began = self._told = time.monotonic()
        self._bar = progress_bar(self.file) if show != "none" and is_bar(show, self.file) else None
        self._task: TaskID | None = None

    def __enter__(self) -> Tally:
        if self._bar is not None:
            self._task = self._bar.add_task(f"{self.jobs} jobs", total=None, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, words: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(words, highlight=False)
        elif self.show != "none":
            print(words, file=self.file, flush=True)

    def begin(self, tenant: Tenant) -> None:
        """A job begins; what a checkpoint holds of it is not counted."""
        self.total += tenant.args.max_steps - tenant.logbook.state.global_step

    def leave(self, tenant: Tenant) -> None:
        """A job is over, perhaps ahead of its last step."""
        self.over += 1
        self.total -= tenant.args.max_steps - tenant.logbook.state.global_step

    def step(self, tenants: Sequence[Tenant]) -> None:
        """These jobs took a step."""
        self.done += len(tenants)
        self._rows += sum(tenant.settings.batch_size * tenant.settings.grad_accumulation for tenant in tenants)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.total, completed=self.done, numbers=self._text(tenants))
        elif self.show != "none" and time.monotonic() - self._told >= SECONDS:
            self._told = time.monotonic()
            print(f"{self.jobs} jobs {self.done}/{self.total}: {self._text(tenants)}", file=self.file, flush=True)

    def _text(self, tenants: Sequence[Tenant]) -> str:
        losses = [loss for tenant in tenants if (loss := tenant.logbook.last_loss) is not None]
        mean = f"loss {sum(losses) / len(losses):.3f}, " if losses else ""
        pace = speed(self.done, max(self.total - self.done, 0), time.monotonic() - self._began, max(1, round(self._rows / self.done)))
        return f"{len(tenants)} train, {self.over} over, {mean}{pace}"
