"""What procedures add to outcomes, made up; and evidence of made-up records."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from deltatune.study.design import Study
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.record import Record
from deltatune.study.trial import Trial
from deltatune.tasks import get_task


def elsewhere(trial: Trial, score: float) -> dict[str, Any]:
    """Better on rows of the training, worse on every other set."""
    told = trial.options["also"]
    told = told.get(trial.task, next(iter(told.values()))) if isinstance(told, dict) else told
    names = [one if isinstance(one, str) else one["task"] for one in told]
    noise = random.Random(f"{trial.task} {trial.label} elsewhere")
    scores = {name: min(1.0, score + 0.1) if name == "train" else score - noise.uniform(0.1, 0.2) for name in names}
    return {"also": {name: {"metric": "accuracy", "score": value, "rows": 100} for name, value in scores.items()}}


def stages(trial: Trial, score: float) -> dict[str, Any]:
    """A little better with each."""
    last = len(trial.run.methods) - 1
    return {"stages": [{"score": score - 0.02 * (last - n), "validation": score, "steps": 100, "method": "any"} for n in range(last + 1)]}


def stream(trial: Trial, score: float) -> dict[str, Any]:
    """Of each task the less is left the longer it is ago."""
    names = trial.options["tasks"][: trial.options.get("most")]
    lost = 0.0 if trial.options.get("deltas") == "own" else 0.05
    matrix = [[score - lost * (row - column) for column in range(row + 1)] for row in range(len(names))]
    stages = [{"task": name, "score": score, "validation": score, "steps": 40, "curve": [[20, score - 0.1], [40, score]]} for name in names]
    hashes = {"before": "a", "after": "a", "restored": True}
    return {"matrix": matrix, "forgetting": lost * len(names) / 2, "stages": stages, "backbone": hashes}


def write(trial: Trial, score: float) -> dict[str, Any]:
    """Less varied the more is trained."""
    varied = {"full": 0.7, "frozen": 0.9}.get(trial.label, 0.85)
    return {"written": {"distinct-1": varied - 0.3, "distinct-2": varied, "self-bleu": 1 - varied, "texts": 8, "shown": ["a text"]}}


def several(trial: Trial, score: float) -> dict[str, Any]:
    """A little more for every task of the mixture than for the one before."""
    names = trial.task.split(",")
    return {"metric": "mean", "metrics": {f"{name}.{get_task(name).metric}": score + 0.01 * place for place, name in enumerate(names)}}


def stack(trial: Trial, score: float) -> dict[str, Any]:
    """Perplexities that fall by half."""
    texts = [trial.options[name] for name in ("language", "then") if name in trial.options]
    return {"languages": {f"{one['task']}.{one['column']}": {"before": 40.0, "after": 20.0} for one in texts}}


EXTRAS: dict[str, Callable[[Trial, float], dict[str, Any]]] = {
    "elsewhere": elsewhere, "stages": stages, "stream": stream, "write": write, "several": several, "stack": stack,
}  # fmt: skip
"""What the outcomes of a procedure hold besides."""


def evidence(study: Study, records: Iterable[Record]) -> Evidence:
    """What made-up records say."""
    return Evidence(study, list(records))


def record(method: str, task: str, score: float, **fields: Any) -> Record:
    """A trial that is done."""
    number = f"{method} {task} {sorted(fields.items(), key=str)}"
    return Record(
        **{"key": number, "backbone": "minilm", "task": task, "category": "c", "method": method, "seed": 0, "score": score, **fields}
    )
