"""``stages``: the methods of a run one behind the other; those that were trained stay active, and frozen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from deltatune.checkpoint.format import load
from deltatune.injection.attach import attach
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import Method, methods
from deltatune.study.procedures.procedure import procedures
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import TaskData
from deltatune.training.borrowed import trainer_modules
from deltatune.training.files import write_text
from deltatune.training.job import load_framed, spelled
from deltatune.training.place import DELTA
from deltatune.training.run import load_data
from deltatune.training.settings import Settings
from deltatune.training.train import sampled
from deltatune.training.train import train as dt_train

NUMBERS = "numbers.json"
"""Written last: with it, a stage is finished."""

Numbers = dict[str, Any]
T = TypeVar("T", bound=Delta | Composition)
SUMMED = ("trainable_parameters", "delta_bytes")
"""Of all stages together, where each has a delta of its own; of a delta that trains on, the last one's."""


@procedures.register("stages")
def stages(trial: Trial, folder: Path) -> Outcome:
    """Attach, train and freeze each method in turn; the score is that behind the last one.

    ``numbers["stages"]`` holds for each its ``method``, test ``score``, best ``validation`` score and ``steps``; steps of the history run
    on from stage to stage. A finished stage is on disk, and a trial that was killed goes on behind it.
    """
    began, run = time.perf_counter(), trial.run
    data = sampled(load_data(run.task, run.settings), run.settings)
    with trainer_modules():
        torch.manual_seed(run.settings.seed)
        backbone, tokenizer, framing = load_framed(run.backbone, data.task, run.settings)
        told = []
        for number, method in enumerate(spelled(run.methods, tokenizer, framing), 1):

            def fresh(number: int = number, method: Method = method) -> Delta:
                return attach(backbone, method, run.where, layers=run.layers, name=f"stage-{number}", head=number == 1)

            delta, numbers = stage(folder / f"stage-{number}", backbone, fresh, data, run.settings, tokenizer)
            delta.freeze()
            told.append({**numbers, "method": methods.name_of(type(method))})
    seconds = round(time.perf_counter() - began, 3)
    numbers, history = joined(told, summed=SUMMED)
    numbers["stages"] = [{**brief(one), "method": one["method"]} for one in told]
    return Outcome(trial.key, numbers, history, seconds)


def stage(
    place: Path, backbone: nn.Module, fresh: Callable[[], T], data: TaskData, settings: Settings, tokenizer: Any
) -> tuple[T, Numbers]:
    """A delta, or several at once, trained on a task, and what came of it, with the history; of a stage that is finished, from its folder.

    Args:
        place: the stage's folder.
        backbone: with what acts already.
        fresh: attaches the delta that is to be trained, or gives the one that trains on.
        data: the task's rows, sampled already.
        settings: all knobs.
        tokenizer: of the backbone.
    """
    if (place / NUMBERS).exists():
        loaded = load(backbone, place / DELTA)  # of the kind that `fresh` gives: that is what was saved
        return cast("T", loaded), json.loads((place / NUMBERS).read_text(encoding="utf-8"))
    torch.manual_seed(settings.seed)  # as if it were the only one
    delta = fresh()
    place.mkdir(parents=True, exist_ok=True)
    return delta, trained_on(delta, data, settings, tokenizer, place / NUMBERS, out=place / DELTA, overwrite=True)


def trained_on(trained: Delta | Composition, data: TaskData, settings: Settings, tokenizer: Any, kept: Path, **wanted: Any) -> Numbers:
    """What comes of training what is attached, with the history; written to ``kept`` too.

    Args:
        trained: a delta, or a composition whose mixers train.
        data: the task's rows, sampled already.
        settings: all knobs.
        tokenizer: of the backbone.
        kept: a file for the numbers.
        wanted: what ``dt.train`` is told besides.
    """
    chosen = replace(settings, shots=None).to_dict()  # a sample of the sample would be too small
    result = dt_train(trained.backbone, data, trained, tokenizer=tokenizer, progress="none", **wanted, **chosen)
    numbers = {**result.to_json(), "history": result.history}
    del numbers["out"]
    write_text(kept, json.dumps(numbers) + "\n")
    return numbers


def brief(numbers: Mapping[str, Any]) -> Numbers:
    """A stage in a line: test score, best validation score (None where none was taken), steps."""
    validation = [entry["eval_score"] for entry in numbers["history"] if "eval_score" in entry]
    return {"score": numbers["score"], "validation": max(validation, default=None), "steps": numbers["steps"]}


def joined(told: Sequence[Mapping[str, Any]], summed: Sequence[str] = ()) -> tuple[Numbers, tuple[Numbers, ...]]:
    """The numbers and the history of stages as those of one trial: scores are the last one's, steps, tokens and seconds run on."""
    numbers = {name: value for name, value in told[-1].items() if name not in ("history", "method")}
    for name in ("seconds", "tokens", "steps", *summed):
        numbers[name] = sum(one[name] for one in told)
    numbers["peak_memory_bytes"] = max(one["peak_memory_bytes"] for one in told)
    history: list[Numbers] = []
    done = 0
    for number, one in enumerate(told, 1):
        history += [{**entry, "step": entry["step"] + done, "stage": number} for entry in one["history"]]
        done += one["steps"]
    return numbers, tuple(history)
