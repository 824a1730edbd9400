"""``dt.train``: the main job as one function."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.checkpoint.folder import check_free
from deltatune.checkpoint.format import save
from deltatune.errors import Diverged, InvalidValue
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import Method
from deltatune.methods.making import make
from deltatune.structure.where import Where
from deltatune.tasks import Task, TaskData
from deltatune.tasks.metrics import Measured
from deltatune.tasks.sampling import fewer, k_shot, subset
from deltatune.tasks.tensors import Features, tokens_of
from deltatune.training.batches import Streamed
from deltatune.training.borrowed import give_back, left_alone, recomputing, recomputing_inputs, trainer_modules
from deltatune.training.curve import curve_of, draw_curve
from deltatune.training.evaluation import measure_rows
from deltatune.training.freed import keeping_freed
from deltatune.training.job import Job, attached_job, make_job, name_of
from deltatune.training.place import CURVE, RunFolder, is_main
from deltatune.training.recorded import of_type
from deltatune.training.result import Result
from deltatune.training.run import DataFile, Run, installed_versions, load_data
from deltatune.training.settings import Settings
from deltatune.training.state import check_finite
from deltatune.training.trackers import check_trackers
from deltatune.training.watch import Show, watching

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltatune.training.kept import KeptRows
    from deltatune.training.trainer import Material


def train(
    backbone: str | nn.Module,
    task: str | Task | TaskData | DataFile,
    method: str | Method | Sequence[str | Method] | Delta | Composition,
    *,
    where: Where | None = None,
    layers: Any = None,
    out: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    progress: Show = "auto",
    **settings: Any,
) -> Result:
    """Train a delta on a task, score it on the task's test rows, and save it.

    With ``out``, the folder gets ``delta/`` (open it with ``dt.open(out)``), ``metrics.json``, ``curve.png`` and
    ``run.yaml``, which replays the run. A run that was killed resumes from its last checkpoint when the same is asked for
    again, and ends with the same weights as if it had not been.

    Args:
        backbone: an alias, installed package, folder or hub id; or a transformers model, which keeps the delta.
        task: a task's name, or several with commas between; its definition, its rows, or a ``DataFile`` of your own.
        method: a recipe, its name, or several that train together; or what is attached to the model already: a delta that
            trains further, or a composition whose mixers train, with those of its members that are not frozen.
        where: sites, as in ``attach``; the method's default roles if left out.
        layers: layers, as in ``attach``.
        out: the run's folder; of what was attached already, the delta's own. Nothing is kept on disk if left out.
        tokenizer: of a model that was given; found by the model's name if left out.
        overwrite: replace a run in ``out``.
        progress: ``bar``, ``lines``, ``none``, or ``auto``: a bar on a terminal, lines elsewhere.
        settings: the fields of ``training.settings.Settings``: ``epochs``, ``lr``, ``batch_size``, ``bf16``, ...

    Raises:
        UnknownName: a backbone, task, method, field or setting nobody knows.
        InvalidValue: a value out of its range, or a task that does not fit the model's head.
        NoSite: an entry of ``where`` that hits nothing.
        OutputError: ``out`` holds something already, or cannot be written.
        Diverged: the numbers are no longer finite; nothing is kept.

    Example:
        >>> from deltatune.methods import LoRA
        >>> result = train("minilm", "bbc-news", LoRA(rank=8), out="runs/bbc")  # doctest: +SKIP
        >>> result.score > 0.9  # doctest: +SKIP
        True
    """
    chosen = Settings.of(settings)
    check_trackers(chosen.report_to)
    if isinstance(method, Delta | Composition):
        if method.backbone is not backbone or where is not None or layers is not None:
            raise InvalidValue(f"`{method.name}` is attached already. Give train the model it sits on, and neither `where` nor `layers`.")
        return _train_attached(method, load_data(task, chosen), task, chosen, tokenizer, out, overwrite, progress)
    methods = tuple(make(one) if isinstance(one, str) else one for one in ([method] if isinstance(method, str | Method) else method))
    if not methods:
        raise InvalidValue("train was given no method. Name one, such as `lora`.")
    data = load_data(task, chosen)
    run = run_of(backbone, task, data, methods, chosen, written_where(where), layers)
    place = None if out is None or callable(where) else RunFolder(out, run, overwrite=overwrite)
    with trainer_modules():
        job = make_job(backbone, sampled(data, chosen), methods, where, layers, chosen, tokenizer)
        try:
            if callable(where):
                run = dataclasses.replace(run, where=_paths(job))
                place = None if out is None else RunFolder(out, run, overwrite=overwrite)
            return _conduct(job, run, place, progress)
        except BaseException:
            if isinstance(backbone, nn.Module):
                job.dissolve()
            raise


def _train_attached(
    trained: Delta | Composition,
    data: TaskData,
    task: str | Task | TaskData | DataFile,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | os.PathLike[str] | None,
    overwrite: bool,
    show: Show,
) -> Result:
    if out is not None:
        check_free(Path(out).expanduser(), overwrite)
    members = trained.deltas if isinstance(trained, Composition) else [trained]
    run = run_of(trained.backbone, task, data, tuple(delta.method for delta in members), settings)
    with trainer_modules():
        job = attached_job(trained, sampled(data, settings), settings, tokenizer)
        result = _conduct(job, run, None, show)
    if out is not None and is_main():
        result.out = _save(job, run, result, Path(out).expanduser(), overwrite=overwrite)
        result.delta_bytes = bytes_in(result.out)
    return result


def sampled(data: TaskData, settings: Settings) -> TaskData:
    """The rows that a run sees: all, a few of each class, or so many in all."""
    if settings.shots is not None:
        return k_shot(data, settings.shots, settings.shots_seed)
    return data if settings.train_rows == 0 else fewer(data, settings.train_rows, settings.shots_seed)


def run_of(
    backbone: str | nn.Module,
    task: str | Task | TaskData | DataFile,
    data: TaskData,
    methods: tuple[Method, ...],
    settings: Settings,
    where: Any = None,
    layers: Any = None,
) -> Run:
    """What is asked for, as ``run.yaml`` holds it."""
    return Run(
        backbone=name_of(backbone) or type(backbone).__name__,
        task=task if isinstance(task, str | DataFile) else data.task.name,
        methods=methods,
        where=where,
        layers=layers,
        settings=settings,
        fingerprint=data.fingerprint,
        versions=installed_versions(),
    )


def replay(run: Run, *, out: str | os.PathLike[str] | None = None, overwrite: bool = False, progress: Show = "auto") -> Result:
    """Do again what a ``run.yaml`` says.

    Raises:
        InvalidValue: its data is not what it was.
    """
    data = load_data(run.task, run.settings)
    if run.fingerprint and data.fingerprint != run.fingerprint:
        raise InvalidValue(
            f"The run was trained on other rows of `{data.task.name}` (fingerprint {run.fingerprint[:12]}) than are found now "
            f"({data.fingerprint[:12]}). Install the same data, or delete `fingerprint` from the file to train on these."
        )
    return train(
        run.backbone, run.task, run.methods, where=run.where, layers=run.layers, out=out, overwrite=overwrite, progress=progress,
        **run.settings.to_dict(),
    )  # fmt: skip


@dataclass(frozen=True)
class Course:
    """What the training itself came to; where nothing trains, nothing.

    Attributes:
        steps: optimiser steps.
        seconds: evaluations and checkpoints included.
        seconds_per_step: median of a step.
        peak_memory_bytes: most memory meanwhile.
        tokens: of the training rows that were read, each time they were; padding left out.
        history: losses and validation scores by step.
    """

    steps: int = 0
    seconds: float = 0.0
    seconds_per_step: float = 0.0
    peak_memory_bytes: int = 0
    tokens: int = 0
    history: tuple[dict[str, Any], ...] = ()


def _conduct(job: Job, run: Run, place: RunFolder | None, show: Show) -> Result:
    """Train, score on the test rows, and write what came of it."""
    with ExitStack() as stack:
        if place is not None and is_main():
            stack.push(lambda kind, *_: None if kind is None else place.abandon(resumable=not issubclass(kind, Diverged)))
            place.open()
        stack.enter_context(keeping_freed())
        stack.enter_context(left_alone(job.backbone, job.trained))
        course = _course(job, run.settings, place, show, stack) if job.trains else Course()
        return conclude(job, run, place, course, show)


def conclude(job: Job, run: Run, place: RunFolder | None, course: Course, show: Show) -> Result:
    """Score what was trained on the test rows, and write the run's files."""
    settings = run.settings
    test = subset(job.data.task, job.data.test, settings.test_rows) if settings.test_rows else job.data.test
    with watching(f"{label_of(job)} test rows", show=show if is_main() else "none") as watch:
        measured = measure_rows(job.framing, job.backbone, test, settings.eval_batch_size, watch)
    result = _result(job, measured, course)
    if place is not None and is_main():
        _write(job, run, place, result)
    return result


def _course(job: Job, settings: Settings, place: RunFolder | None, show: Show, stack: ExitStack) -> Course:
    """Train; what has to be given back is left to the caller's stack."""
    from deltatune.training.arguments import Schedule, training_arguments
    from deltatune.training.measure import StepTimer, peak_memory
    from deltatune.training.progress import progress as shown
    from deltatune.training.trainer import DeltaTrainer

    timer, material = StepTimer(), job.material(settings)
    folder = place.checkpoints if place else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltatune-")))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    schedule = Schedule.of(settings, len(material.kept), processes=processes, resumable=place is not None)
    rows_a_step = settings.batch_size * settings.grad_accumulation * processes
    watched = shown(show, label_of(job), job.metric, rows_a_step)
    if settings.gradient_checkpointing:
        stack.enter_context(recomputing(job.backbone))
    if settings.recompute:
        stack.enter_context(recomputing_inputs(job.backbone))
    kept = kept_rows(job, settings, material) if settings.keep_frozen else None
    trainer = DeltaTrainer(
        job.backbone,
        job.trained,
        material,
        training_arguments(settings, schedule, folder, job.lr),
        keep_best=settings.early_stopping is not None,
        patience=settings.early_stopping,
        kept=kept,
        callbacks=[timer, *([watched] if watched else [])],
    )
    stack.callback(give_back, trainer)
    if watched is not None:
        stack.callback(watched.close)
    began = time.perf_counter()
    with peak_memory() as peak:
        trainer.run()
    check_finite(job.trained, trainer.state.global_step)
    return Course(
        steps=trainer.state.global_step,
        seconds=round(time.perf_counter() - began, 3),
        seconds_per_step=round(timer.seconds_per_step, 5),
        peak_memory_bytes=peak.bytes,
        tokens=tokens_read(material.train, trainer.state.global_step, settings, processes),
        history=tuple(entry for entry in trainer.state.log_history if "loss" in entry or "eval_score" in entry),
    )


def kept_rows(job: Job, settings: Settings, material: Material) -> KeptRows:
    """What the frozen layers give for the training rows, on the device where the training will be."""
    from deltatune.training.kept import KeptRows

    assert settings.keep_frozen is not None and not isinstance(material.train, Streamed)
    if torch.accelerator.is_available():
        job.backbone.to(torch.accelerator.current_accelerator())
    size, bf16 = settings.eval_batch_size, settings.bf16
    return KeptRows(job.backbone, job.framing, material.train, settings.keep_frozen, batch_size=size, bf16=bf16)


def tokens_read(train: Sequence[Features] | Streamed, steps: int, settings: Settings, processes: int = 1) -> int:
    """Tokens of the rows that so many steps read, on average over their order; of a stream, over what it gave.

    >>> tokens_read([{"input_ids": [1, 2, 3]}] * 20, 5, Settings(batch_size=2))
    30
    """
    rows = steps * settings.batch_size * settings.grad_accumulation * processes
    if isinstance(train, Streamed):
        return round(rows * train.tokens / max(train.given, 1))
    return round(rows * sum(map(tokens_of, train)) / max(len(train), 1))


def label_of(job: Job) -> str:
    """The names of what trains, for people."""
    return "+".join(one.name for one in job.trained)


def _result(job: Job, measured: dict[str, Measured], course: Course) -> Result:
    score = measured[job.metric]
    budgets = [one.budget() for one in job.trained]
    return Result(
        score=score.value,
        metric=job.metric,
        metrics={name: one.value for name, one in measured.items()},
        intervals={name: (one.low, one.high) for name, one in measured.items()},
        degenerate=score.degenerate,
        trainable_parameters=job.size,
        stored_parameters=sum(budget.delta for budget in budgets),
        total_parameters=budgets[0].N,
        seconds=course.seconds,
        seconds_per_step=course.seconds_per_step,
        peak_memory_bytes=course.peak_memory_bytes,
        tokens=course.tokens,
        delta_bytes=sum(budget.size_bytes for budget in budgets),
        steps=course.steps,
        out=None,
        history=list(course.history),
        backbone=job.backbone,
        tokenizer=job.tokenizer,
        deltas=job.deltas,
    )


def _write(job: Job, run: Run, place: RunFolder, result: Result) -> None:
    """The delta, the picture if something was trained, and at last the numbers, which make the run finished."""
    _save(job, run, result, place.delta, overwrite=True)
    result.out = place.path
    result.delta_bytes = bytes_in(place.delta)
    title = f"{'+'.join(delta.name for delta in job.deltas)} on {job.data.task.name}, {run.backbone}"
    if result.history:
        draw_curve(curve_of(result.history), place.path / CURVE, title=title, metric=result.metric)
    place.finish({**result.to_json(), "history": result.history})


def _save(job: Job, run: Run, result: Result, folder: Path, *, overwrite: bool) -> Path:
    return save(
        job.saved,
        folder,
        overwrite=overwrite,
        backbone_id=job.name,
        where=run.where,
        layers=run.layers,
        task=job.data.task.name,
        labels=job.data.task.labels or None,
        template=_template(job),
        metric=result.metric,
        score=result.score,
        metrics=result.metrics,
        training=training_record(job, run.settings),
        data=run.fingerprint,
        versions=run.versions,
    )


def bytes_in(folder: Path) -> int:
    """Of all files in it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def training_record(job: Job, settings: Settings) -> dict[str, Any]:
    """What a delta file says about its training: enough to open it and to put new texts to it."""
    task = job.framing.task
    return {
        **settings.to_dict(),
        "lr": job.lr,
        "framing": job.framing.name,
        "auto_class": job.framing.auto_class,
        "type": task.type,
        "text": list(task.text),
        "label": task.label,
        "metrics": list(task.metrics),
        **of_type(task),
    }


def _template(job: Job) -> dict[str, Any] | None:
    template = job.framing.template
    if template is None:
        return None
    return {"prompt": template.prompt, "words": list(template.verbalizer.words) if template.verbalizer else None}


def written_where(where: Where | None) -> Any:
    """``where`` as YAML can hold it; a function is written as the paths it hits."""
    if where is None or isinstance(where, str) or callable(where):
        return None if callable(where) else where
    if any(callable(entry) for entry in where):
        raise InvalidValue("`where` mixes names and functions, which run.yaml cannot hold. Write one function, or names only.")
    return tuple(where)


def _paths(job: Job) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.site.path for delta in job.deltas for entry in delta.entries if not entry.head))
