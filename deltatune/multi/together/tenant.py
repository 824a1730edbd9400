"""A tenant: one job while it trains, with all that is its own: rows, rate, clipping, random numbers, steps, scores, checkpoints.

It does step by step what ``DeltaTrainer`` does, with forward and backward left to whoever computes them, and keeps the same
checkpoints: a run that was begun together can be finished alone, and the other way round.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import safe_globals

from deltatune.errors import Diverged
from deltatune.methods.kinds import Penalised, Phased, Stepping, Stochastic
from deltatune.multi.ground import Ground
from deltatune.multi.streams import Stream
from deltatune.multi.together.flat import Flat
from deltatune.multi.together.logbook import Logbook
from deltatune.multi.together.updates import Batch, Updates
from deltatune.tasks.tensors import items
from deltatune.training.job import Job
from deltatune.training.life import Life
from deltatune.training.measure import most_memory
from deltatune.training.optimizer import optimizer_of
from deltatune.training.settings import Settings
from deltatune.training.state import check_finite
from deltatune.training.train import Course, tokens_read
from deltatune.training.trainer import Material


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
        logbook: what its steps came to.
        seconds: of each step, its share of what is computed together.
    """

    def __init__(self, job: Job, material: Material, settings: Settings, args: TrainingArguments) -> None:
        self.job, self.material, self.settings, self.args = job, material, settings, args
        self.device = next(parameter.device for parameter in job.backbone.parameters())
        self.stream = Stream(settings.seed, self.device)
        self.life = Life(job.trained, args.max_steps)
        self.logbook = Logbook(job, material, settings, args)
        self.optimizer = optimizer_of(job.trained, args)
        warmup = args.get_warmup_steps(args.max_steps)
        self.schedule = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, args.max_steps)
        self.items: Tensor | int = 1
        self.seconds: list[float] = []
        self._began = time.perf_counter()
        self._flat: Flat | None = None
        self._changes = any(isinstance(delta.method, Phased | Stepping | Penalised) for delta in job.deltas)
        self._drawing = [patch for delta in job.deltas for patch in delta.patches if isinstance(patch, Stochastic)]
        self._updates = Updates(material, settings, args.seed, self.stream, self.device)
        self._batches: Iterator[tuple[float, list[Batch]]] = iter(())
        self._epoch = 0.0

    def begin(self) -> None:
        """Look at data, or go on behind the last complete checkpoint."""
        last = self.logbook.resume()
        step = self.logbook.state.global_step
        self.job.backbone.train()
        if last is None:
            self._batches = self._updates.behind(0)
            with self.stream:
                self.life.begin(self._updates.plain(self.job.backbone))
            return
        self.life.resume(step)
        self.logbook.read(last)
        if self.logbook.is_over:
            return
        self.optimizer.load_state_dict(torch.load(last / "optimizer.pt", weights_only=True, map_location=self.device))
        self.schedule.load_state_dict(torch.load(last / "scheduler.pt", weights_only=True))
        with safe_globals():  # type: ignore[no-untyped-call]
            held = torch.load(last / "rng_state.pth", weights_only=True)
        self._batches = self._updates.behind(step, held)

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
        self._epoch, batches = next(self._batches)
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
        self.optimizer.release()
        shape = Flat.shape(self.optimizer)
        if shape not in grounds:
            grounds[shape] = Flat.new_ground(self.optimizer)
        self._flat = Flat(self.optimizer, grounds[shape])

    def release(self) -> None:
        """What it trains has memory of its own again."""
        if self._flat is not None:
            self._flat.release()
            self._flat = None
        self.optimizer.release()

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
        number = self.logbook.state.global_step + 1
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise Diverged(
                f"The training diverged: at step {number}, the {'gradients' if torch.isfinite(loss) else 'loss'} of "
                f"`{'+'.join(one.name for one in self.job.trained)}` are NaN or infinite. Lower the learning rate (`lr`), or clip the "
                "gradients to a smaller norm (`max_grad_norm`)."
            )
        self.life.add_penalty()
        self.optimizer.step()
        self.life.after_step()
        rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.forget()
        self.logbook.note(loss, norm, rate, self._epoch)
        if self.logbook.score():
            optimizer = self.optimizer.state_dict() if self._flat is None else self._flat.state_dict()
            self.logbook.save({"optimizer.pt": optimizer, "scheduler.pt": self.schedule.state_dict(), "rng_state.pth": self.stream.held})

    def conclude(self) -> Course:
        """The best deltas where they are kept, in their final form; what the training came to.

        Raises:
            Diverged: a delta holds NaN or infinity.
        """
        self.release()
        self.logbook.read_best()
        self.life.finish()
        steps = self.logbook.state.global_step
        check_finite(self.job.trained, steps)
        self.job.backbone.eval()
        ordered = sorted(self.seconds[1:] or self.seconds or [0.0])
        return Course(
            steps=steps,
            seconds=round(time.perf_counter() - self._began, 3),
            seconds_per_step=round(ordered[len(ordered) // 2], 5),
            peak_memory_bytes=most_memory(),
            tokens=tokens_read(self.material.train, steps, self.settings),
            history=self.logbook.history,
        )
