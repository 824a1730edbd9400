"""``several``: the tasks of a mixture in one trial, by one delta for all of them, one for each, or a fusion of these for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltatune.checkpoint.format import load
from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.delta import Delta
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.stages import SUMMED, Numbers, joined, stage, trained_on
from deltatune.study.procedures.stream import Item, item_of
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import TaskData
from deltatune.tasks.framing import Framing
from deltatune.tasks.mixture import mixed
from deltatune.training.borrowed import trainer_modules
from deltatune.training.job import choose_framing, kind_of, load_framed, spelled
from deltatune.training.place import DELTA
from deltatune.training.run import Run, load_data
from deltatune.training.train import sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEAN = "mean"
ALL = "all"


@dataclass(frozen=True)
class Bench:
    """What all trainings of a trial share.

    Attributes:
        run: of the trial.
        folder: of the trial.
        backbone: bare ahead of each training.
        tokenizer: of the backbone.
        items: the tasks.
    """

    run: Run
    folder: Path
    backbone: nn.Module
    tokenizer: PreTrainedTokenizerBase
    items: Sequence[Item]


@procedures.register("several")
def several(trial: Trial, folder: Path) -> Outcome:
    """Train on the tasks of a mixture, and score each on the same test rows, however it was trained.

    ``numbers["metrics"]`` has each task's own metrics as ``task.metric``, and ``mean``, which is the score. A finished training is on disk,
    and a trial that was killed goes on behind it.

    Options:
        deltas: ``shared``, one delta on the rows of all; ``own``, one for each task; or ``fused``: one for each, then for each task a
            fusion of all of them, trained for as many steps again while they are frozen.

    Raises:
        InvalidValue: options that cannot be, several methods, or a single task.
        UnknownName: a task nobody knows.
    """
    began, run = time.perf_counter(), trial.run
    names, way = asked(trial)
    with trainer_modules():
        torch.manual_seed(run.settings.seed)
        data = [sampled(load_data(name), run.settings) for name in names]
        backbone, tokenizer, _ = load_framed(run.backbone, data[0].task, run.settings)
        items = [item_of(one, backbone, tokenizer, run) for one in data]
        trainings, tasks = way(Bench(run, folder, backbone, tokenizer, items))
    numbers, history = joined(trainings, summed=SUMMED if len(trainings) > 1 else ())
    return Outcome(trial.key, {**numbers, **_mean_of(names, tasks)}, history, round(time.perf_counter() - began, 3))


def shared(bench: Bench) -> tuple[list[Numbers], list[Numbers]]:
    """One delta on the rows of all tasks; each is scored by itself."""
    run, data = bench.run, mixed([item.data for item in bench.items], bench.run.settings.temperature)
    framing = choose_framing(data.task, kind_of(bench.backbone), run.settings, bench.tokenizer)
    _, numbers = _trained(bench, ALL, data, framing)
    return [numbers], [item.measured(bench.backbone, run.settings.eval_batch_size) for item in bench.items]


def own(bench: Bench) -> tuple[list[Numbers], list[Numbers]]:
    """A delta for each task, on the backbone as it was."""
    told = []
    for item in bench.items:
        delta, numbers = _trained(bench, item.data.task.name, item.data, item.framing)
        detach(delta)
        told.append(numbers)
    return told, told


def fused(bench: Bench) -> tuple[list[Numbers], list[Numbers]]:
    """A delta for each task, then all of them at once, mixed for each task by layers that learn when to listen to which."""
    alone, _ = own(bench)
    names = [item.data.task.name for item in bench.items]
    members = [load(bench.backbone, bench.folder / name / DELTA, name=f"{name}-delta") for name in names]
    together = [_fusion(bench, item, [member for member in members if isinstance(member, Delta)]) for item in bench.items]
    return [*alone, *together], together


Way = Callable[[Bench], tuple[list[Numbers], list[Numbers]]]
WAYS: Mapping[str, Way] = {"shared": shared, "own": own, "fused": fused}
"""Each gives the numbers of its trainings, and of the tasks."""


def asked(trial: Trial) -> tuple[list[str], Way]:
    """The tasks, and the way they are trained.

    Raises:
        InvalidValue: options that cannot be, several methods, or a single task.
    """
    names, way = parts_of(trial.task), str(trial.options.get("deltas"))
    if len(names) < 2 or way not in WAYS or len(trial.run.methods) > 1:
        raise InvalidValue(
            f"The procedure `several` of `{trial.said}` was given {len(names)} tasks, `deltas: {way}` and "
            f"{len(trial.run.methods)} methods. It wants two tasks or more with commas between, one of {', '.join(WAYS)}, and one method."
        )
    return names, WAYS[way]


def parts_of(task: str) -> list[str]:
    """The names in that of a mixture.

    >>> parts_of("boolq, subj")
    ['boolq', 'subj']
    """
    return [name.strip() for name in task.split(",") if name.strip()]


def _trained(bench: Bench, name: str, data: TaskData, framing: Framing) -> tuple[Delta, Numbers]:
    run = bench.run

    def fresh() -> Delta:
        [method] = spelled(run.methods, bench.tokenizer, framing)
        return attach(bench.backbone, method, run.where, layers=run.layers, name=f"{name}-delta")

    return stage(bench.folder / name, bench.backbone, fresh, data, run.settings, bench.tokenizer)


def _fusion(bench: Bench, item: Item, members: Sequence[Delta]) -> Numbers:
    """The numbers of one task's fusion; its layers are not kept."""
    kept = bench.folder / f"{item.data.task.name}-fusion.json"
    if kept.exists():
        found: Numbers = json.loads(kept.read_text(encoding="utf-8"))
        return found
    torch.manual_seed(bench.run.settings.seed)
    fusion = compose(bench.backbone, members, how="fusion", name="fusion")
    numbers = trained_on(fusion, item.data, bench.run.settings, bench.tokenizer, kept)
    fusion.dissolve()
    return numbers


def _mean_of(names: Sequence[str], tasks: Sequence[Numbers]) -> Numbers:
    """The tasks' numbers as those of their mixture."""
    score = fmean(one["score"] for one in tasks)
    metrics = {f"{task}.{name}": value for task, one in zip(names, tasks, strict=True) for name, value in one["metrics"].items()}
    intervals = {f"{task}.{name}": ends for task, one in zip(names, tasks, strict=True) for name, ends in one["intervals"].items()}
    degenerate = any(one["degenerate"] for one in tasks)
    return {"score": score, "metric": MEAN, "metrics": {MEAN: score, **metrics}, "intervals": intervals, "degenerate": degenerate}
