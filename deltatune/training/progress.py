"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.training.trainer import SCORE
from deltatune.training.watch import SECONDS, Show, is_bar, progress_bar, speed


def progress(show: Show, label: str, metric: str, rows_a_step: int, file: TextIO | None = None) -> ProgressBar | ProgressLines | None:
    """The callback for a way of showing.

    Args:
        show: how.
        label: in front of everything, such as the method's name.
        metric: name of the validation score.
        rows_a_step: training rows an optimiser step, for the throughput.
        file: where to; standard error if left out, so that output can be piped.
    """
    if show == "none":
        return None
    out = sys.stderr if file is None else file
    if is_bar(show, out):
        return ProgressBar(label, metric, rows_a_step, out)
    return ProgressLines(label, metric, rows_a_step, out)


class _Watched(TrainerCallback):
    """Loss, score, throughput and time left of the training in progress."""

    def __init__(self, label: str, metric: str, rows_a_step: int, file: TextIO) -> None:
        self.label = label
        self.metric = metric
        self.rows_a_step = rows_a_step
        self.file = file
        self.loss: float | None = None
        self.score: float | None = None
        self._started = 0.0
        self._first = 0
        self._paused = 0.0

    def begin(self, state: TrainerState) -> None:
        """Start the clock; a resumed run starts behind its first steps, and says so."""
        self._started, self._first = time.monotonic(), state.global_step
        if self._first and state.is_world_process_zero:
            print(f"{self.label} goes on behind step {self._first} of {state.max_steps}.", file=self.file, flush=True)

    def take(self, logs: dict[str, float] | None) -> None:
        """Remember the newest numbers."""
        self.loss = (logs or {}).get("loss", self.loss)
        self.score = (logs or {}).get(SCORE, self.score)

    def text(self, state: TrainerState) -> str:
        """The numbers in words: ``loss 0.42, accuracy 0.91, 57 rows/s, 0:41 left``."""
        done = state.global_step - self._first
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.score is not None:
            parts.append(f"{self.metric} {self.score:.3f}")
        if done:
            seconds = time.monotonic() - self._started
            parts.append(speed(done, state.max_steps - state.global_step, seconds, self.rows_a_step))
        return ", ".join(parts)


class ProgressBar(_Watched):
    """A rich progress bar."""

    def __init__(self, label: str, metric: str, rows_a_step: int, file: TextIO) -> None:
        super().__init__(label, metric, rows_a_step, file)
        self._bar = progress_bar(file)
        self._task: TaskID | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the bar."""
        self.begin(state)
        if state.is_world_process_zero:
            self._task = self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step, numbers="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move it."""
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step, numbers=self.text(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the newest numbers."""
        self.take(kwargs.get("logs"))
        if self._task is not None:
            self._bar.update(self._task, numbers=self.text(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave it as it stands."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also when the training broke off."""
        self._bar.stop()


class ProgressLines(_Watched):
    """A plain line every ``seconds``, and at the end."""

    seconds = SECONDS

    def __init__(self, label: str, metric: str, rows_a_step: int, file: TextIO) -> None:
        super().__init__(label, metric, rows_a_step, file)
        self._shown = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self.begin(state)
        self._shown = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the newest numbers."""
        self.take(kwargs.get("logs"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print, if it is time."""
        if time.monotonic() - self._shown >= self.seconds:
            self._print(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the last line."""
        self._print(state)

    def close(self) -> None:
        """Nothing to give back."""

    def _print(self, state: TrainerState) -> None:
        self._shown = time.monotonic()
        if state.is_world_process_zero:
            print(f"{self.label} {state.global_step}/{state.max_steps}: {self.text(state)}", file=self.file, flush=True)
