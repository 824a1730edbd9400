"""Studies that are made up: designs on tiny backbones, and stores filled without training anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deltatune.study.design import Entry, Study, study_from_dict
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.record import Record
from deltatune.study.store.store import Store
from deltatune.study.trial import Outcome, Trial

QUALITY = {
    "full": 0.80, "lora": 0.79, "adapter": 0.785, "prefix-tuning": 0.77, "prompt-tuning": 0.62, "bitfit": 0.775, "diff-pruning": 0.772,
    "last-layers": 0.73, "linear-probe": 0.66, "frozen": 0.35, "random-delta": 0.34,
}  # fmt: skip
TRAINED = {"full": 22_000_000, "prefix-tuning": 900_000, "adapter": 600_000, "lora": 74_000, "bitfit": 28_000, "diff-pruning": 110_000}
TASKS = ("bbc-news", "tweet-sentiment", "glue-sst2", "glue-rte", "glue-mrpc", "glue-cola", "glue-qnli", "ag-news", "boolq", "atis-intent")


def design(**fields: Any) -> Study:
    """A study with a few tasks and methods; ``fields`` over it."""
    written = {"name": "made-up", "backbones": ["minilm"], "tasks": list(TASKS), "methods": ["full", "lora", "bitfit"], "profile": "full"}
    return study_from_dict({**written, **fields})


def outcome(trial: Trial, **numbers: Any) -> Outcome:
    """A score that is better for better methods, with noise by task and seed; ``numbers`` over what it says."""
    task, noise = random.Random(trial.task), random.Random(f"{trial.task} {trial.label} {trial.seed}")
    score = min(0.99, max(0.0, QUALITY.get(trial.label, 0.7) + task.uniform(-0.15, 0.15) + noise.gauss(0, 0.012)))
    history = [{"step": 10 * step, "loss": 1 / step, "eval_score": score * step / (step + 0.3)} for step in range(1, 6)]
    trained = TRAINED.get(trial.label, 0 if trial.label in ("frozen", "random-delta") else 3_000)
    found = {
        "score": score, "metric": "accuracy", "metrics": {"accuracy": score}, "intervals": {"accuracy": [score - 0.02, score + 0.02]},
        "degenerate": trial.label == "frozen", "trainable_parameters": trained, "total_parameters": 22_700_000, "seconds": 20.0,
        "seconds_per_step": 0.1, "peak_memory_bytes": 500_000_000, "tokens": 60_000, "delta_bytes": 4 * trained, "steps": 200,
    }  # fmt: skip
    more = EXTRAS.get(trial.procedure, lambda trial, score: {})(trial, score)
    return Outcome(trial.key, {**found, **more, **numbers}, tuple(history), 25.0)


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


EXTRAS: dict[str, Callable[[Trial, float], dict[str, Any]]] = {"elsewhere": elsewhere, "stages": stages, "stream": stream, "write": write}
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


def filled(place: Path, study: Study, leave: Sequence[str] = ()) -> Store:
    """A store with the study, every trial done but for those of the methods to leave."""
    store = Store(place)
    store.add(study)
    with store.writer(study.name) as writer:
        for trial in writer.waiting():
            if trial.label not in leave:
                writer.start(trial)
                writer.finish(outcome(trial))
    return store


def entry(label: str, method: Any, **fields: Any) -> Entry:
    """A method of a study."""
    return Entry(label, (method,), **fields)
