"""``movement``: a training, then how far each kind of parameter it chose has moved, and what becomes of the model if that is undone."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.methods.kinds import SelectionPatch
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.train import RUN, train
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks.metrics import compute
from deltatune.tasks.sampling import subset
from deltatune.training.borrowed import trainer_modules
from deltatune.training.files import write_text
from deltatune.training.job import Job, attached_job
from deltatune.training.opening import open as dt_open
from deltatune.training.run import load_data
from deltatune.training.train import sampled

MOVED = "movement.json"
ROWS = 512
"""Most test rows on which a kind is undone."""


@procedures.register("movement")
def movement(trial: Trial, folder: Path) -> Outcome:
    """Train; then ``numbers["movement"]`` has a line for each parameter that the deltas chose (task heads left out).

    A line holds the ``kind`` (the site's role; with its place in the layer behind it, where a layer has several of one role), the
    ``layer``, ``change`` = mean |theta - theta_0|, ``norm`` = ||theta - theta_0||, ``size``, and the ``original`` mean |theta_0|.

    ``numbers["undone"]`` says of each kind what comes of putting it back to theta_0, and of ``all`` of them: the ``score`` on at most 512
    test rows, and the share of them with the ``same`` answer as before; of ``none``, the score of the model as it is.
    """
    began, kept = time.perf_counter(), folder / MOVED
    outcome = train(trial, folder)
    if not kept.exists():
        write_text(kept, json.dumps(_looked(trial, folder / RUN)))
    numbers = {**outcome.numbers, **json.loads(kept.read_text(encoding="utf-8"))}
    return Outcome(trial.key, numbers, outcome.history, round(time.perf_counter() - began, 3))


def _looked(trial: Trial, place: Path) -> dict[str, Any]:
    """The numbers of a finished run."""
    with trainer_modules():
        _, tokenizer, saved = dt_open(place)
        settings = trial.run.settings
        job = attached_job(saved, sampled(load_data(trial.run.task, settings), settings), settings, tokenizer)
        kinds = kinds_of(job.deltas)
        lines = [line_of(kind, entry) for kind, entries in kinds.items() for entry in entries]
        return {"movement": lines, "undone": _undone(job, kinds, settings.eval_batch_size)}


def kinds_of(deltas: Sequence[Delta]) -> dict[str, list[Entry]]:
    """The parameters that deltas chose, by kind, in the order of the model."""
    chosen = [entry for delta in deltas for entry in delta.entries if isinstance(entry.patch, SelectionPatch) and not entry.head]
    places: dict[str, set[str]] = defaultdict(set)
    for entry in chosen:
        places[_role(entry)].add(_place(entry))
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in chosen:
        role = _role(entry)
        kinds[role if len(places[role]) == 1 else f"{role} {_place(entry)}"].append(entry)
    return dict(kinds)


def _role(entry: Entry) -> str:
    return entry.site.role or "other"


def _place(entry: Entry) -> str:
    """The parameter's path within its layer, or its whole path outside the layers."""
    layers = entry.site.layer_list
    return entry.place if layers is None else entry.place.removeprefix(f"{layers.path}.{entry.site.layer}.")


def line_of(kind: str, entry: Entry) -> dict[str, Any]:
    """How far one parameter has moved."""
    theta_0 = entry.choice.original.float()
    moved = entry.parameter.detach().float() - theta_0
    return {
        "kind": kind,
        "layer": entry.site.layer,
        "change": float(moved.abs().mean()),
        "norm": float(moved.norm()),
        "original": float(theta_0.abs().mean()),
        "size": moved.numel(),
    }


def _undone(job: Job, kinds: dict[str, list[Entry]], batch_size: int) -> dict[str, dict[str, float]]:
    task = job.data.task
    rows = subset(task, job.data.test, ROWS)

    def looked() -> tuple[float, list[Any]]:
        said = [answer.value for answer in job.framing.answers(job.backbone, rows, batch_size)]
        return compute(task.metrics, said, job.framing.references(rows), rows)[task.metric], said

    score, before = looked()
    found = {"none": {"score": score, "same": 1.0}}
    every = [entry for entries in kinds.values() for entry in entries]
    for kind, entries in {**kinds, "all": every}.items():
        with undone(entries):
            score, said = looked()
        found[kind] = {"score": score, "same": sum(a == b for a, b in zip(said, before, strict=True)) / max(len(before), 1)}
    return found


@contextmanager
def undone(entries: Sequence[Entry]) -> Iterator[None]:
    """Put parameters back to theta_0 for a moment."""
    kept = [(entry.parameter, entry.parameter.detach().clone(), entry.choice.original) for entry in entries]
    with torch.no_grad():
        for parameter, _, original in kept:
            parameter.copy_(original)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, _ in kept:
                parameter.copy_(value)
