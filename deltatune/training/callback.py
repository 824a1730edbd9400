"""The bridge from ``transformers.Trainer`` to a method's life; it works with any Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltatune.errors import CheckpointError, InvalidValue
from deltatune.training.life import Given, Life, parts_of
from deltatune.training.state import has_state, read_state, write_state

Batches = Iterable[Mapping[str, Any]]


class DeltaCallback(TrainerCallback):
    """Calls what the deltas' methods declare: prepare, penalty, steps, phases, export; see ``Life``.

    Each checkpoint gets the deltas' own files, from which a resumed run goes on, because transformers loads a model's
    weights non-strictly and would lose a delta without a word.

    Args:
        deltas: the deltas and compositions that train.
        batches: what methods look at before the first step; the Trainer's own training batches if left out.
        saves: put the deltas into each checkpoint; False where the Trainer does.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> Trainer(backbone, args, train_dataset=rows, callbacks=[DeltaCallback(delta)]).train()  # doctest: +SKIP
    """

    def __init__(self, deltas: Given | Sequence[Given], batches: Batches | None = None, *, saves: bool = True) -> None:
        self.deltas = parts_of(deltas)
        self.saves = saves
        self.batches = batches
        self._life: Life | None = None

    @property
    def life(self) -> Life:
        """The life of the training in progress.

        Raises:
            InvalidValue: no training is in progress.
        """
        if self._life is None:
            raise InvalidValue("This DeltaCallback has seen no training yet. Give it to a Trainer as callbacks=[...] and call train().")
        return self._life

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare the methods, or go on where the checkpoint stands."""
        self._life = Life(self.deltas, state.max_steps)
        if state.global_step:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            if not has_state(folder):
                raise CheckpointError(
                    f"The run resumes at step {state.global_step}, but `{folder.name}` in the output folder holds no delta. "
                    "Resume from a checkpoint in `output_dir` that was written with this callback."
                )
            self.life.resume(state.global_step)
            read_state(self.deltas, folder)
        else:
            self.life.begin(self.batches if self.batches is not None else _plain_batches(kwargs["train_dataloader"], args.device))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Enter the phases that begin with this step."""
        self.life.before_step()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gradients of the penalties."""
        self.life.add_penalty()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the methods act on the step, while the gradients are there."""
        self.life.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the deltas into the checkpoint, over those of an earlier run in the same folder."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.saves and state.is_world_process_zero:
            write_state(self.deltas, folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Bring the deltas into their final form."""
        self.life.finish()


def _plain_batches(loader: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """The training rows in order, by a loader of our own: a half-read one of the Trainer's would shift its order of rows."""
    own = DataLoader(loader.dataset, batch_size=loader.batch_sampler.batch_size, collate_fn=loader.collate_fn, generator=torch.Generator())
    for batch in own:
        yield {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
