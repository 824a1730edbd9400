"""A tenant: one job while it trains, with all that is its own: rows, rate, clipping, random numbers, steps, scores, checkpoints.

It does step by step what ``DeltaTrainer`` does, with forward and backward left to whoever computes them, and keeps the same
checkpoints: a run that was begun together can be finished alone, and the other way round.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import safe_globals

from deltatune.errors import Diverged
from deltatune.methods.kinds import Penalised, Phased, Stepping, Stochastic
from deltatune.multi.ground import Ground
from deltatune.multi.streams import Stream
from deltatune.multi.together.flat import Flat
from deltatune.tasks.tensors import Features, items, length_of, moved
from deltatune.training.batches import LengthGrouped
from deltatune.training.evaluation import score_rows
from deltatune.training.files import discard, is_complete, mark_complete, writing
from deltatune.training.job import Job
from deltatune.training.life import Life
from deltatune.training.measure import most_memory
from deltatune.training.optimizer import optimizer_of
from deltatune.training.settings import Settings
from deltatune.training.state import check_finite, read_state, write_state
from deltatune.training.train import Course, tokens_read
from deltatune.training.trainer import SCORE, Material, best_step, checkpoints, is_exhausted, last_checkpoint

Batch = dict[str, Tensor]


class Tenant:
    """One job while it trains.

    Args:
        job: its model, rows and deltas.
        material: encoded rows and loss.
        settings: its knobs.
        args: the same as a Trainer is told; checkpoints go to ``output_dir``.

    Attributes:
        stream: its random numbers.
        life: its methods' phases.
        state: steps and history, as a Trainer keeps them.
        seconds: of each step, its share of what is computed together.
    """

    def __init__(self, job: Job, material: Material, settings: Settings, args: TrainingArguments) -> None:
        self.job, self.material, self.settings, self.args = job, material, settings, args
        self.device = next(parameter.device for parameter in job.backbone.parameters())
        self.stream = Stream(settings.seed, self.device)
        self.life = Life(job.trained, args.max_steps)
        kept: Any = [TrainerControl()]  # what a Trainer that goes on looks for in the state
        self.state = TrainerState(max_steps=args.max_steps, train_batch_size=settings.batch_size, stateful_callbacks=kept)
        self.state.compute_steps(args, args.max_steps)  # type: ignore[no-untyped-call]
        self.optimizer = optimizer_of(job.trained, args)
        warmup = args.get_warmup_steps(args.max_steps)
        self.schedule = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, args.max_steps)
        self.items: Tensor | int = 1
        self.seconds: list[float] = []
        self._loss = torch.zeros((), device=self.device)
        self._logged = 0
        self._began = time.perf_counter()
        self._stopped = False
        self._flat: Flat | None = None
        self._changes = any(isinstance(delta.method, Phased | Stepping | Penalised) for delta in job.deltas)
        self._drawing = [patch for delta in job.deltas for patch in delta.patches if isinstance(patch, Stochastic)]
        self._updates: Iterator[tuple[float, list[Batch]]] = iter(())
        self._epoch = 0.0

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return Path(str(self.args.output_dir))

    @property
    def keeps_best(self) -> bool:
        """It ends with the deltas of its best score."""
        return self.settings.early_stopping is not None

    @property
    def is_over(self) -> bool:
        """It takes no further step."""
        return self._stopped or self.state.global_step >= self.args.max_steps

    def begin(self) -> None:
        """Look at data, or go on behind the last complete checkpoint."""
        for path in checkpoints(self.folder):
            if not is_complete(path):
                discard(path)
        last = last_checkpoint(self.folder)
        if last is None:
            self._updates = self._read(0, 0, None)
            self.job.backbone.train()
            with self.stream:
                self.life.begin(self._plain())
            return
        self.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        step = self._logged = self.state.global_step
        self.life.resume(step)
        read_state(self.job.trained, last)
        self._stopped = self._is_exhausted()
        self.job.backbone.train()
        if self.is_over:
            return
        self.optimizer.load_state_dict(torch.load(last / "optimizer.pt", weights_only=True, map_location=self.device))
        self.schedule.load_state_dict(torch.load(last / "scheduler.pt", weights_only=True))
        with safe_globals():  # type: ignore[no-untyped-call]
            held = torch.load(last / "rng_state.pth", weights_only=True)
        self._updates = self._read(*divmod(step, self._steps_in_epoch), held)

    @property
    def _batches_in_epoch(self) -> int:
        return -(-len(self.material.kept) // self.settings.batch_size)

    @property
    def _steps_in_epoch(self) -> int:
        return -(-self._batches_in_epoch // self.settings.grad_accumulation)

    def _plain(self) -> Iterator[Batch]:
        """The training rows in order."""
        own = self._loader(range(len(self.material.kept)), torch.Generator())
        for batch in own:
            yield moved(batch, self.job.backbone)

    def _loader(self, order: Any, generator: torch.Generator | None = None) -> DataLoader[Features]:
        rows: Any = self.material.kept
        return DataLoader(rows, self.settings.batch_size, sampler=order, collate_fn=self.material.framing.collate, generator=generator)

    def _read(self, epoch: int, skipped: int, held: dict[str, Any] | None) -> Iterator[tuple[float, list[Batch]]]:
        """The batches of each step, for ever; a resumed run has the random numbers of its checkpoint once it stands there again."""
        order = LengthGrouped([length_of(row) for row in self.material.kept], self.settings.batch_size, seed=self.args.seed)
        loader, several, whole = self._loader(order), self.settings.grad_accumulation, self._batches_in_epoch
        if held is not None and not skipped:
            self.stream.held |= held
            held = None
        for number in count(epoch):
            order.set_epoch(number)
            with self.stream:
                iter(loader)  # draws a number, as a run by itself does
            assert loader.batch_sampler is not None
            batches = iter(loader.batch_sampler)
            for update in range(self._steps_in_epoch):
                size = min(several, whole - update * several)
                found = [self._collated(next(batches)) for _ in range(size)]
                if number == epoch and update < skipped:
                    continue
                if held is not None:
                    self.stream.held |= held
                    held = None
                yield number + (update * several + size) / whole, found

    def _collated(self, numbers: Sequence[int]) -> Batch:
        """Rows as a batch; a loader's own way to it takes longer than collating."""
        batch = self.material.framing.collate([self.material.train[number] for number in numbers])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @property
    def form(self) -> tuple[int, ...]:
        """Changes when a phase or a step gives the deltas another form."""
        return (self.life.phases, *map(id, self._parameters())) if self._changes else ()

    def _parameters(self) -> Iterable[nn.Parameter]:
        """All of the deltas', each once."""
        if not self._changes:
            return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {id(parameter): parameter for one in self.job.trained for parameter in one.parameters()}.values()

    def next(self) -> list[Batch]:
        """The batches of the next step; its phases are entered."""
        self._epoch, batches = next(self._updates)
        self.items = sum((items(batch) for batch in batches), torch.zeros((), dtype=torch.long, device=self.device))
        self.life.before_step()
        return batches

    def draw(self) -> None:
        """A training forward begins: gates and the like are drawn anew."""
        if self._drawing:
            with self.stream:
                for patch in self._drawing:
                    patch.draw()

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Its part of the step's mean loss."""
        return self.material.objective(model, batch, self.items)

    def alone(self, batches: list[Batch]) -> Tensor:
        """Forward and backward on its own shell; the sum of the losses."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.stream, torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
                loss = self.loss(self.job.backbone, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def forget(self) -> None:
        """Gradients are nothing again."""
        if self._flat is not None:
            self._flat.clear()
            return
        for parameter in self._parameters():
            parameter.grad = None

    @property
    def wants_ground(self) -> bool:
        """It has gradients for everything it trains, and keeps its form: it can lie flat."""
        return self._flat is None and not self._changes and Flat.fits(self.optimizer)

    @property
    def row(self) -> int:
        """Of its ground; behind all others where it has none."""
        return sys.maxsize if self._flat is None else self._flat.row

    def settle(self, grounds: dict[Hashable, Ground]) -> None:
        """Lie flat from now on, on the ground of its shape."""
        shape = Flat.shape(self.optimizer)
        if shape not in grounds:
            grounds[shape] = Flat.new_ground(self.optimizer)
        self._flat = Flat(self.optimizer, grounds[shape])

    def release(self) -> None:
        """What it trains has memory of its own again."""
        if self._flat is not None:
            self._flat.release()
            self._flat = None

    def norm(self) -> Tensor:
        """Norm of its gradients, which are clipped to the largest that is allowed."""
        if self._flat is not None:
            return self._flat.clip(self.args.max_grad_norm)
        held = [parameter for parameter in self._parameters() if parameter.grad is not None]
        return clip_grad_norm_(held, self.args.max_grad_norm or float("inf"))

    def step(self, loss: Tensor, norm: Tensor) -> None:
        """Take an optimiser step with the gradients that are there; then log, score and save where it is time.

        Raises:
            Diverged: loss or gradients are no longer finite.
        """
        number = self.state.global_step + 1
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise Diverged(
                f"The training diverged: at step {number}, the {'gradients' if torch.isfinite(loss) else 'loss'} of "
                f"`{'+'.join(one.name for one in self.job.trained)}` are NaN or infinite. Lower the learning rate (`lr`), or clip the "
                "gradients to a smaller norm (`max_grad_norm`)."
            )
        self._loss += loss
        self.life.add_penalty()
        self.optimizer.step()
        self.life.after_step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.forget()
        self.state.global_step, self.state.epoch = number, self._epoch
        if number % self.state.logging_steps == 0:
            mean = self._loss.item() / (number - self._logged)
            self._log({"loss": mean, "grad_norm": norm.item(), "learning_rate": rate})
            self._loss.zero_()
            self._logged = number
        self._look(number)

    def _log(self, entry: dict[str, float]) -> None:
        self.state.log_history.append({**entry, "epoch": self.state.epoch, "step": self.state.global_step})

    def _look(self, number: int) -> None:
        """Score the validation rows and save, where the schedule says so."""
        ends = number >= self.args.max_steps
        scores = self.args.eval_strategy == "steps" and (number % int(self.args.eval_steps or 1) == 0 or ends)
        saves = self.args.save_strategy == "steps" and (number % int(self.args.save_steps) == 0 or ends)
        if scores:
            check_finite(self.job.trained, number)
            values = score_rows(self.material.framing, self.job.backbone, self.material.validation, self.settings.eval_batch_size)
            self._log({f"eval_{name}": value for name, value in values.items()})
            self._stopped = self._is_exhausted()
        if saves or (scores and self.keeps_best):
            self._save()

    def _is_exhausted(self) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and is_exhausted(self.job.trained, self.state, patience)

    @property
    def score(self) -> float | None:
        """The newest validation score."""
        return next((entry[SCORE] for entry in reversed(self.state.log_history) if SCORE in entry), None)

    @property
    def last_loss(self) -> float | None:
        """The newest logged loss."""
        return next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), None)

    def _save(self) -> None:
        """A checkpoint, marked once it is complete; older ones go, but for the best."""
        check_finite(self.job.trained, self.state.global_step)
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with writing(folder, (RuntimeError,)):
            discard(folder)
            folder.mkdir(parents=True)
            write_state(self.job.trained, folder)
            torch.save((self._flat or self.optimizer).state_dict(), folder / "optimizer.pt")
            torch.save(self.schedule.state_dict(), folder / "scheduler.pt")
            torch.save(self.stream.held, folder / "rng_state.pth")
            self.state.save_to_json(str(folder / "trainer_state.json"))
        mark_complete(folder)
        best = best_step(self.job.trained, self.state) if self.keeps_best else None
        for older in checkpoints(self.folder):
            if older != folder and older.name != f"checkpoint-{best}":
                discard(older)

    def conclude(self) -> Course:
        """The best deltas where they are kept, in their final form; what the training came to.

        Raises:
            Diverged: a delta holds NaN or infinity.
        """
        self.release()
        best = best_step(self.job.trained, self.state) if self.keeps_best else None
        if best is not None and best != self.state.global_step:
            read_state(self.job.trained, self.folder / f"checkpoint-{best}")
        self.life.finish()
        check_finite(self.job.trained, self.state.global_step)
        self.job.backbone.eval()
        ordered = sorted(self.seconds[1:] or self.seconds or [0.0])
        return Course(
            steps=self.state.global_step,
            seconds=round(time.perf_counter() - self._began, 3),
            seconds_per_step=round(ordered[len(ordered) // 2], 5),
            peak_memory_bytes=most_memory(),
            tokens=tokens_read(self.material.train, self.state.global_step, self.settings),
            history=tuple(entry for entry in self.state.log_history if "loss" in entry or SCORE in entry),
        )
