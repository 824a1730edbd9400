"""``DeltaTrainer``: transformers' Trainer with checkpoints of the deltas, an order of rows that resumes, and a task's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.errors import CheckpointError
from deltatune.tasks import Rows
from deltatune.tasks.framing import Framing
from deltatune.tasks.tensors import Features, length_of
from deltatune.training.batches import LengthGrouped, Streamed
from deltatune.training.callback import DeltaCallback
from deltatune.training.evaluation import score_rows
from deltatune.training.files import discard, is_complete, mark_complete, writing
from deltatune.training.flat import FlatAdamW
from deltatune.training.kept import ROW, KeptRows
from deltatune.training.life import Life, Trained, deltas_of, phase_starts
from deltatune.training.objective import Objective
from deltatune.training.optimizer import optimizer_of
from deltatune.training.state import check_finite, read_state, write_state

SCORE = "eval_score"


@dataclass
class Material:
    """What a run trains on.

    Attributes:
        framing: how rows become inputs.
        objective: the loss.
        train: encoded training rows, or what gives them one after the other.
        validation: rows that are scored in the course of the run.
    """

    framing: Framing
    objective: Objective
    train: list[Features] | Streamed
    validation: Rows

    @property
    def kept(self) -> list[Features]:
        """The encoded training rows that are here; none where they are streamed."""
        return [] if isinstance(self.train, Streamed) else self.train


class DeltaTrainer(Trainer):
    """The Trainer for deltas: the one class here that overrides another's methods, because the Trainer is made for it.

    A checkpoint holds the deltas, optimiser, scheduler, random state and data position, never the backbone, and a marker
    once it is complete. Resumed from its last complete checkpoint, a run ends with the same bits as one that was not
    interrupted.

    Args:
        backbone: the model the deltas are attached to.
        deltas: those that train, and compositions whose mixers do.
        material: data, framing and loss.
        args: transformers' arguments; see ``training.arguments``.
        keep_best: end with the deltas of the best validation score instead of the last ones.
        patience: stop after so many evaluations without a better score.
        kept: what the frozen layers give for the training rows; None computes it in every step.
        callbacks: further callbacks, such as the progress bar.
    """

    def __init__(
        self,
        backbone: nn.Module,
        deltas: Sequence[Trained],
        material: Material,
        args: TrainingArguments,
        *,
        keep_best: bool = False,
        patience: int | None = None,
        kept: KeptRows | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.backbone = backbone
        self.deltas = list(deltas)
        self.material = material
        self.keep_best = keep_best
        self.patience = patience
        self.kept = kept
        self._flat: FlatAdamW | None = None
        batches = None if kept is None else kept.plain_batches(args.per_device_train_batch_size)
        own: list[TrainerCallback] = [DeltaCallback(self.deltas, batches, saves=False)]
        if patience is not None:
            own.append(EarlyStopping(self.deltas, patience))
        super().__init__(
            model=backbone,
            args=args,
            data_collator=material.framing.collate if kept is None else kept.collate,
            train_dataset=material.train if kept is None else kept.numbered(),
            eval_dataset=material.validation,
            callbacks=[*own, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # items are counted over accumulated batches, for ``compute_loss``
        self._loss_shifts_labels = False

    def run(self) -> None:
        """Train, or go on from the last complete checkpoint in the output folder; what is incomplete there is removed."""
        folder = Path(str(self.args.output_dir))
        last = last_checkpoint(folder)
        if self.args.should_save:
            for path in checkpoints(folder):
                if not is_complete(path):
                    discard(path)
        if last is None:
            self._train(None)
            return
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        stopped = self.patience is not None and is_exhausted(self.deltas, state, self.patience)
        if stopped or state.global_step >= self.args.max_steps:
            self._conclude(last, state)
        else:
            self._train(str(last))

    def _train(self, folder: str | None) -> None:
        """Train, from a checkpoint on where one is given; then every Parameter has memory of its own again."""
        try:
            self.train(resume_from_checkpoint=folder)
        finally:
            if self._flat is not None:
                self._flat.release()

    def _conclude(self, folder: Path, state: TrainerState) -> None:
        """Finish a run that was killed behind its last step: the Trainer would take one step more."""
        self.state = state
        life = Life(self.deltas, state.max_steps)
        life.resume(state.global_step)
        read_state(self.deltas, folder)
        if self.keep_best:
            self.restore_best()
        life.finish()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [length_of(feature) for feature in self.material.kept]
        return LengthGrouped(lengths, self.args.train_batch_size, seed=self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the deltas' own groups of parameters."""
        if self.optimizer is None:
            self.optimizer = self._flat = optimizer_of(self.deltas, self.args)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The task's loss, averaged over the items of all batches of the optimiser step and of all processes."""
        rows = inputs.pop(ROW, None)
        with nullcontext() if rows is None or self.kept is None else self.kept.given(rows.tolist()):
            loss = self.material.objective(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Not counted: the Trainer would walk over all parameters at every step."""
        return 0

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The task's metrics on the validation rows; draws no random numbers, so it leaves the training as it is."""
        check_finite(self.deltas, self.state.global_step)
        rows = self.material.validation if eval_dataset is None else eval_dataset
        values = score_rows(self.material.framing, self.backbone, rows, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.keep_best and self.is_in_train:
            self.control.should_save = True
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_state(self.deltas, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self.deltas, self.state.global_step)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            if self.args.should_save:
                discard(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
                best = best_step(self.deltas, self.state) if self.keep_best else None
                for older in checkpoints(folder.parent):
                    if older != folder and older.name != f"checkpoint-{best}":
                        discard(older)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with writing(Path(output_dir), (RuntimeError,)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with writing(Path(output_dir), (RuntimeError,)):
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # the deltas are read by DeltaCallback, once the phases they have entered are known
        if not is_complete(Path(resume_from_checkpoint)):
            raise CheckpointError(f"`{Path(resume_from_checkpoint).name}` is not complete. Resume from another checkpoint, or start anew.")

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self.keep_best:
            self.restore_best()
        return super()._finalize_training(trial, num_train_samples, start_time)  # type: ignore[no-untyped-call]

    def restore_best(self) -> None:
        """Give the deltas back the values of the best evaluation."""
        step = best_step(self.deltas, self.state)
        if step is not None and step != self.state.global_step:
            read_state(self.deltas, Path(str(self.args.output_dir)) / f"checkpoint-{step}")


class EarlyStopping(TrainerCallback):
    """Stops after ``patience`` evaluations without a better score; it looks at the log only, so resuming needs nothing more."""

    def __init__(self, deltas: Sequence[Trained], patience: int) -> None:
        self.deltas = list(deltas)
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the evaluations since the best one."""
        if is_exhausted(self.deltas, state, self.patience):
            control.should_training_stop = True


def is_exhausted(deltas: Sequence[Trained], state: TrainerState, patience: int) -> bool:
    """Whether the last ``patience`` evaluations brought nothing better."""
    scores = [score for _, score in _evaluations(deltas, state)]
    return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])


def best_step(deltas: Sequence[Trained], state: TrainerState) -> int | None:
    """The step of the best validation score, the latest of equals; None before the first evaluation."""
    return max(((score, step) for step, score in _evaluations(deltas, state)), default=(0.0, None))[1]


def _evaluations(deltas: Sequence[Trained], state: TrainerState) -> list[tuple[int, float]]:
    """(step, score) of the evaluations that count: of phased methods, those within the last phase only."""
    last = max(((phase_starts(delta, state.max_steps)[-1:] or [0])[0] for delta in deltas_of(deltas)), default=0)
    return [(int(entry["step"]), entry[SCORE]) for entry in state.log_history if SCORE in entry and entry["step"] > last]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder; None if there is none."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)
