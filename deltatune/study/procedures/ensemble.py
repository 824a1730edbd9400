"""``ensemble``: several deltas of one recipe and different seeds answer together, in one routed batch, and the majority decides."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load
from deltatune.errors import Unsupported
from deltatune.injection.delta import Delta
from deltatune.multi.routing import route
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.train import RUN, train
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import TaskData
from deltatune.tasks.metrics import measure
from deltatune.tasks.sampling import subset
from deltatune.tasks.tensors import Features, by_length, evaluating
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training.borrowed import trainer_modules
from deltatune.training.files import write_text
from deltatune.training.job import attached_job
from deltatune.training.opening import delta_folder
from deltatune.training.opening import open as dt_open
from deltatune.training.run import load_data

MEMBERS = 5
VOTED = "ensemble.json"


@procedures.register("ensemble")
def ensemble(trial: Trial, folder: Path) -> Outcome:
    """Train ``members`` deltas (an option; 5 if left out), each in a folder of its own, and score their vote.

    Member i has the seed ``members`` * seed + i. A batch holds each row once for every member, ``dt.route`` gives each copy its member, and
    the answer most of them give stands; of several, the likeliest on average. ``score`` is the vote's.

    ``numbers["ensemble"]`` has ``singles`` (the score of each member), ``mean`` and ``best`` of them, the score of the mean probability
    (``averaged``), and ``rounds``: of each batch the seconds of the routed forward, and of the members' own forwards one after the other.

    Raises:
        Unsupported: the backbone answers by a head, or the task's answers cannot be listed.
    """
    began, count = time.perf_counter(), int(trial.options.get("members", MEMBERS))
    seed = trial.run.settings.seed * count
    runs = [replace(trial.run, settings=replace(trial.run.settings, seed=seed + number)) for number in range(count)]
    outcomes = [train(replace(trial, run=run), folder / f"member-{number}") for number, run in enumerate(runs)]
    kept = folder / VOTED
    if not kept.exists():
        found = _voted(trial, [folder / f"member-{number}" / RUN for number in range(count)])
        write_text(kept, json.dumps(found))
    numbers = {**outcomes[0].numbers, **json.loads(kept.read_text(encoding="utf-8"))}
    for name in ("seconds", "steps", "tokens", "trainable_parameters", "delta_bytes"):
        numbers[name] = sum(one.numbers[name] for one in outcomes)
    return Outcome(trial.key, numbers, outcomes[0].history, round(time.perf_counter() - began, 3))


def _voted(trial: Trial, places: Sequence[Path]) -> dict[str, Any]:
    with trainer_modules():
        backbone, tokenizer, first = dt_open(places[0], name="member-0")
        if not isinstance(first, Delta):
            raise Unsupported(f"`{trial.said}` asks for an ensemble of several deltas at once. Give one recipe.")
        names = [first.name]
        names += [load(backbone, delta_folder(place), name=f"member-{number}").name for number, place in enumerate(places[1:], 1)]
        settings = trial.run.settings
        framing = attached_job(first, load_data(trial.run.task, settings), settings, tokenizer).framing
        if not isinstance(framing, TextToTextFraming) or not framing.is_closed:
            raise Unsupported(f"`{trial.said}` asks for an ensemble, which votes by label words. Take a decoder and a task with labels.")
        return voted(framing, backbone, names, load_data(trial.run.task, settings), settings.test_rows, settings.eval_batch_size)


def voted(
    framing: TextToTextFraming, backbone: nn.Module, names: Sequence[str], data: TaskData, test_rows: int, batch_size: int
) -> dict[str, Any]:
    """The numbers of attached deltas that answer together, over those of a run."""
    rows = subset(data.task, data.test, test_rows) if test_rows else data.test
    inputs, seconds = framing.encode_inputs(rows), []
    scores = torch.empty(len(names), len(rows), framing.task.outputs)
    with evaluating(backbone), torch.no_grad():
        for batch in by_length(inputs, max(batch_size // len(names), 1)):
            chosen = [inputs[index] for index in batch]
            began = time.perf_counter()
            together = routed(framing, backbone, names, chosen)
            middle = time.perf_counter()
            for name in names:
                with _alone(backbone, name, len(chosen)):
                    framing.score_batch(backbone, chosen)
            seconds.append([round(middle - began, 6), round(time.perf_counter() - middle, 6)])
            scores[:, batch] = together
    truth = framing.references(rows)
    metric = framing.task.metric
    singles = [measure(metric, framing.predict(one), truth, rows)[metric].value for one in scores]
    measured = measure(framing.task.metrics, framing.predict(majority(scores)), truth, rows)
    averaged = measure(metric, framing.predict(scores.exp().mean(0)), truth, rows)[metric].value
    told = {"singles": singles, "mean": fmean(singles), "best": max(singles), "averaged": averaged, "rounds": seconds}
    return {
        "score": measured[metric].value,
        "metrics": {name: one.value for name, one in measured.items()},
        "intervals": {name: [one.low, one.high] for name, one in measured.items()},
        "degenerate": measured[metric].degenerate,
        "ensemble": told,
    }


def routed(framing: TextToTextFraming, backbone: nn.Module, names: Sequence[str], inputs: Sequence[Features]) -> Tensor:
    """Log-probabilities (members, rows, answers) from one batch that holds each row once for every member."""
    copies = [feature for feature in inputs for _ in names]
    with route(backbone, [name for _ in inputs for name in names]):
        scores = framing.score_batch(backbone, copies)
    return scores.float().cpu().view(len(inputs), len(names), -1).transpose(0, 1)


@contextmanager
def _alone(backbone: nn.Module, name: str, rows: int) -> Iterator[None]:
    """One member acts in every row."""
    with route(backbone, [name] * rows):
        yield


def majority(scores: Tensor) -> Tensor:
    """Votes for each answer, and its mean probability as a part of a vote where votes are equal.

    Args:
        scores: log-probabilities, (members, rows, answers).

    Returns:
        (rows, answers).
    """
    votes = nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).sum(0)
    return votes + scores.softmax(-1).mean(0) / 2
