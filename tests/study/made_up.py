"""Studies that are made up: designs on tiny backbones, and stores filled without training anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltatune.study.design import Entry, Study, study_from_dict
from deltatune.study.store.store import Store
from deltatune.study.trial import Outcome, Trial
from tests.study.made_up_numbers import EXTRAS

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
    own = NUMBERS[trial.procedure](trial) if trial.procedure in NUMBERS else {}
    own |= EXTRAS[trial.procedure](trial, score) if trial.procedure in EXTRAS else {}
    return Outcome(trial.key, {**found, **own, **numbers}, tuple(history), 25.0)


COSTS = {"full": (16.0, 1.0), "diff-pruning": (36.0, 2.0)}
"""Bytes a parameter, and seconds of a step; others take 4 and 0.5."""


def cost(trial: Trial) -> dict[str, Any]:
    """What the procedure of that name gives: the adapter's inference is slower."""
    a_parameter, seconds = COSTS.get(trial.label, (4.0, 0.5))
    batch, length = trial.run.settings.batch_size, trial.run.settings.max_length
    noise = random.Random(trial.key)
    slower = 1.3 if trial.label == "adapter" else 1.0
    parts = {"forward": 1.0, "backward": seconds, "optimiser": 0.2 * seconds, "inference": slower}
    full = {"forward": 1.0, "backward": 1.0, "optimiser": 0.2, "inference": 1.0}
    rounds = [{part: [noise.uniform(0.99, 1.01) * length * own, length * full[part]] for part, own in parts.items()} for _ in range(3)]
    return {
        "score": None,
        "metric": None,
        "live_bytes": int(a_parameter * 1e8 + 1e5 * batch * length),
        "rounds": rounds if batch < 8 else [],
    }


FAR = {"attention.query": 0.02, "attention.key": 0.001, "feed_forward.up": 0.018}
"""Change of biases; others 0.01."""


def movement(trial: Trial) -> dict[str, Any]:
    """What the procedure of that name gives, of two layers."""
    noise = random.Random(trial.key)
    kinds = (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "feed_forward.up",
        "feed_forward.down",
        "norm a",
        "norm b",
    )
    same = {"kind": "", "layer": 0, "change": 0.0, "norm": 0.1, "size": 32, "original": 0.1}
    lines = [
        {**same, "kind": kind, "layer": layer, "change": FAR.get(kind, 0.01) * noise.uniform(0.95, 1.05)}
        for kind in kinds
        for layer in (0, 1)
    ]
    undone = {kind: {"score": 0.7, "same": 1.0 if kind == "attention.key" else 0.9} for kind in kinds}
    return {"movement": lines, "undone": {"none": {"score": 0.8, "same": 1.0}, **undone}}


def ensemble(trial: Trial) -> dict[str, Any]:
    """What the procedure of that name gives."""
    rounds = [[0.9, 1.0], [0.8, 1.0]]
    return {"ensemble": {"singles": [0.6, 0.7], "mean": 0.65, "best": 0.7, "averaged": 0.69, "rounds": rounds}}


def templates(trial: Trial) -> dict[str, Any]:
    """What the procedure of that name gives: less spread where something was trained."""
    spread = 0.3 if trial.label == "zero-shot" else 0.1
    scores = {"own": 0.6, "other": 0.7, "a -> b": 0.6 - spread, "c -> d": 0.6}
    return {"templates": [{"change": change, "prompt": change, "score": score} for change, score in scores.items()]}


NUMBERS: dict[str, Callable[[Trial], dict[str, Any]]] = {
    "cost": cost, "movement": movement, "ensemble": ensemble, "templates": templates,
}  # fmt: skip
"""What further procedures give, by their name."""


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
