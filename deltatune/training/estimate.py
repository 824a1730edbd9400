"""``dt.estimate``: what a run would need, told before it trains; ``deltatune tune --dry-run`` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.backbones import load_backbone
from deltatune.errors import InvalidValue
from deltatune.methods.kinds import Method
from deltatune.methods.making import make
from deltatune.structure.where import Where
from deltatune.tasks import Rows, Task, TaskData
from deltatune.tasks.sampling import subset
from deltatune.tasks.tensors import Features, length_of, moved
from deltatune.training.batches import LengthGrouped
from deltatune.training.borrowed import left_alone, trainer_modules
from deltatune.training.forecast import Estimate, at_rest, forecast
from deltatune.training.job import Job, make_job
from deltatune.training.life import Life
from deltatune.training.live import held_bytes
from deltatune.training.objective import Objective
from deltatune.training.run import DataFile, load_data
from deltatune.training.settings import Settings
from deltatune.training.steps import Batch, Steps
from deltatune.training.train import sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1024
"""Training rows whose lengths stand for all."""


def estimate(
    backbone: str | nn.Module,
    task: str | Task | TaskData | DataFile,
    method: str | Method | Sequence[str | Method],
    *,
    where: Where | None = None,
    layers: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Estimate:
    """What a step of ``dt.train`` with the same arguments needs: peak memory and seconds.

    Nothing is trained or written: what is attached for it is detached again. Memory is that of the longest batch among some of the
    training rows, time that of the batch of median length; evaluations and checkpoints come on top of both.

    Args:
        backbone: as in ``train``.
        task: as in ``train``.
        method: a recipe, its name, or several that train together.
        where: as in ``train``.
        layers: as in ``train``.
        tokenizer: as in ``train``.
        settings: the fields of ``training.settings.Settings``.

    Raises:
        InvalidValue: nothing would train, or ``keep_frozen`` is set, whose steps differ from epoch to epoch.
        UnknownName: a backbone, task, method, field or setting nobody knows.
        NoSite: an entry of ``where`` that hits nothing.

    Example:
        >>> found = estimate("minilm", "bbc-news", "lora", batch_size=16)  # doctest: +SKIP
        >>> found.live_bytes, found.resident_bytes, found.seconds  # doctest: +SKIP
    """
    chosen = Settings.of(settings)
    if chosen.keep_frozen is not None:
        raise InvalidValue("With `keep_frozen` the first pass differs from the others. Estimate without it: that is the most it takes.")
    recipes = [make(one) if isinstance(one, str) else one for one in ([method] if isinstance(method, str | Method) else method)]
    data = sampled(load_data(task, chosen), chosen)
    held = [(held_bytes(), at_rest(backbone))] if isinstance(backbone, nn.Module) else []

    def load(*args: Any, **options: Any) -> nn.Module:
        loaded = load_backbone(*args, **options)
        held.append((held_bytes(), at_rest(loaded)))
        return loaded

    with torch.random.fork_rng(), trainer_modules():
        job = make_job(backbone, data, recipes, where, layers, chosen, tokenizer, load)
        with _thrown_away(job, isinstance(backbone, nn.Module)):
            if not job.trains:
                raise InvalidValue("Nothing would train with this method, so there is no step to estimate.")
            loaded_bytes, before = held[-1]
            return _of_job(job, chosen, held_bytes() - loaded_bytes, before)


def _of_job(job: Job, settings: Settings, delta_bytes: int, before: int | None) -> Estimate:
    if torch.accelerator.is_available():
        job.backbone.to(torch.accelerator.current_accelerator())
    longest, usual = _batches(job, settings)
    job.backbone.train()
    Life(job.trained, 1000).begin([longest(min(4, settings.batch_size))])
    weights = job.framing.class_weights(job.data.train) if settings.class_weights else None
    steps = Steps(job.backbone, job.trained, Objective(job.framing, weights), settings)
    rows = min(settings.batch_size, settings.batch_size if job.data.stream is not None else len(job.data.train))
    with left_alone(job.backbone, job.trained):
        found = forecast(steps, longest, rows, timed=usual, delta_bytes=delta_bytes, before=before)
    passes = settings.grad_accumulation / min(settings.grad_accumulation, 2)
    return replace(found, seconds=found.seconds * passes, processor_seconds=found.processor_seconds * passes)


@contextmanager
def _thrown_away(job: Job, is_given: bool) -> Iterator[None]:
    """What the job attached goes; a model that was given keeps its modes and its buffers, which a forward may count in."""
    modes = {module: module.training for module in job.backbone.modules()}
    kept = {name: one.clone() for name, one in job.backbone.named_buffers()} if is_given else {}
    try:
        yield
    finally:
        job.dissolve()
        for module, mode in modes.items():
            module.training = mode
        buffers = dict(job.backbone.named_buffers())
        for name, one in kept.items():
            if name in buffers and not torch.equal(buffers[name], one):
                buffers[name].copy_(one)


def _batches(job: Job, settings: Settings) -> tuple[Callable[[int], Batch], Callable[[int], Batch]]:
    """The longest batch of an epoch, and that of median length, each with as many of its rows as are asked for, the longest first."""
    features = job.framing.encode(_sample(job, max(SAMPLE, settings.batch_size)))
    lengths = [length_of(one) for one in features]
    order = list(LengthGrouped(lengths, settings.batch_size, settings.seed))
    size = settings.batch_size
    batches = [sorted(order[k : k + size], key=lambda row: -lengths[row]) for k in range(0, len(order), size)]
    whole = sorted((batch for batch in batches if len(batch) == len(batches[0])), key=lambda batch: lengths[batch[0]])
    longest, usual = ([features[row] for row in whole[place]] for place in (-1, len(whole) // 2))
    return _cut(job, longest), _cut(job, usual)


def _cut(job: Job, batch: list[Features]) -> Callable[[int], Batch]:
    return lambda rows: moved(job.framing.collate(batch[:rows]), job.backbone)


def _sample(job: Job, rows: int) -> Rows:
    if job.data.stream is None:
        return subset(job.data.task, job.data.train, rows)
    return list(islice(job.data.stream(0), rows))  # type: ignore[return-value]
