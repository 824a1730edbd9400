"""What the steps of one job came to: losses, validation scores, checkpoints, and when it is over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from deltatune.training.evaluation import score_rows
from deltatune.training.files import discard, is_complete, mark_complete, writing
from deltatune.training.job import Job
from deltatune.training.settings import Settings
from deltatune.training.state import check_finite, read_state, write_state
from deltatune.training.trainer import SCORE, Material, best_step, checkpoints, is_exhausted, last_checkpoint


class Logbook:
    """Keeps what a Trainer keeps, in the same files, so that a run that was begun together can be finished alone.

    Args:
        job: whose deltas are scored and saved.
        material: its validation rows.
        settings: its knobs.
        args: when to log, score and save; checkpoints go to ``output_dir``.

    Attributes:
        settings: its knobs.
        state: steps and history, as a Trainer keeps them.
    """

    def __init__(self, job: Job, material: Material, settings: Settings, args: TrainingArguments) -> None:
        self._job, self._material, self.settings, self._args = job, material, settings, args
        kept: Any = [TrainerControl()]  # what a Trainer that goes on looks for in the state
        self.state = TrainerState(max_steps=args.max_steps, train_batch_size=settings.batch_size, stateful_callbacks=kept)
        self.state.compute_steps(args, args.max_steps)  # type: ignore[no-untyped-call]
        self._loss: Tensor | None = None
        self._logged = 0
        self._stopped = False

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return Path(str(self._args.output_dir))

    @property
    def is_over(self) -> bool:
        """It takes no further step."""
        return self._stopped or self.state.global_step >= self._args.max_steps

    @property
    def last_loss(self) -> float | None:
        """The newest logged loss."""
        return next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), None)

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """Losses and scores."""
        return tuple(entry for entry in self.state.log_history if "loss" in entry or SCORE in entry)

    def resume(self) -> Path | None:
        """Stand behind the last complete checkpoint, and give its folder; None where there is none. What is incomplete goes."""
        for path in checkpoints(self.folder):
            if not is_complete(path):
                discard(path)
        last = last_checkpoint(self.folder)
        if last is not None:
            self.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            self._logged = self.state.global_step
        return last

    def read(self, folder: Path) -> None:
        """The deltas of a checkpoint, once they have the form of its step."""
        read_state(self._job.trained, folder)
        self._stopped = self._is_exhausted()

    def note(self, loss: Tensor, norm: Tensor, rate: float, epoch: float) -> None:
        """One more step was taken."""
        self._loss = loss.clone() if self._loss is None else self._loss + loss
        self.state.global_step += 1
        self.state.epoch = epoch
        if self.state.global_step % self.state.logging_steps == 0:
            mean = self._loss.item() / (self.state.global_step - self._logged)
            self._log({"loss": mean, "grad_norm": norm.item(), "learning_rate": rate})
            self._loss, self._logged = None, self.state.global_step

    def _log(self, entry: dict[str, float]) -> None:
        self.state.log_history.append({**entry, "epoch": self.state.epoch, "step": self.state.global_step})

    def score(self) -> bool:
        """Score the validation rows where it is time; whether it is time to save, too."""
        number, ends = self.state.global_step, self.state.global_step >= self._args.max_steps
        scores = self._args.eval_strategy == "steps" and (number % int(self._args.eval_steps or 1) == 0 or ends)
        saves = self._args.save_strategy == "steps" and (number % int(self._args.save_steps) == 0 or ends)
        if scores:
            check_finite(self._job.trained, number)
            framing, rows = self._material.framing, self._material.validation
            values = score_rows(framing, self._job.backbone, rows, self.settings.eval_batch_size)
            self._log({f"eval_{name}": value for name, value in values.items()})
            self._stopped = self._is_exhausted()
        return saves or (scores and self._keeps_best)

    def _is_exhausted(self) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and is_exhausted(self._job.trained, self.state, patience)

    def save(self, parts: Mapping[str, Any]) -> None:
        """A checkpoint, marked once it is complete; older ones go, but for the best.

        Args:
            parts: what is saved beside deltas and state, by the name of its file.
        """
        check_finite(self._job.trained, self.state.global_step)
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with writing(folder, (RuntimeError,)):
            discard(folder)
            folder.mkdir(parents=True)
            write_state(self._job.trained, folder)
            for name, part in parts.items():
                torch.save(part, folder / name)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        mark_complete(folder)
        for older in checkpoints(self.folder):
            if older != folder and older.name != f"checkpoint-{self._best}":
                discard(older)

    @property
    def _keeps_best(self) -> bool:
        """It ends with the deltas of its best score."""
        return self.settings.early_stopping is not None

    @property
    def _best(self) -> int | None:
        return best_step(self._job.trained, self.state) if self._keeps_best else None

    def read_best(self) -> None:
        """Give the deltas their best values, where these are kept."""
        best = self._best
        if best is not None and best != self.state.global_step:
            read_state(self._job.trained, self.folder / f"checkpoint-{best}")
