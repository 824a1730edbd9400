"""Is LoRA on MiniLM as good as full fine-tuning on BBC News, with under 1% of the parameters?

Both train to their plateau, with 3 seeds: for eight epochs, in which the learning rate falls to nothing, scored sixteen
times on the way; the last four scores, mean over seeds, must not lie more than half a point above the four before
them. Bars: LoRA's mean test accuracy is at least 0.96, and it is not worse than full fine-tuning by more than 2 points:
the lower end of a paired bootstrap interval (95%, over test articles, the seeds of an article kept together) of the
difference lies above -0.02. A run adds a line to ``results/bbc-<settings>.jsonl`` and is not done again, so the benchmark
goes on where it was stopped; it takes about an hour and a half on two cores.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from paired import report

import deltatune as dt
from deltatune.methods import FullFineTuning, LoRA
from deltatune.methods.kinds import Method
from deltatune.tasks import load_task
from deltatune.training.curve import curve_of
from deltatune.training.predict import Predictor

SEEDS = (13, 21, 42)
RECIPES: dict[str, tuple[Method, dict[str, Any]]] = {
    "LoRA": (LoRA(rank=8), {"lr": 3e-3}),
    "full fine-tuning": (FullFineTuning(), {"lr": 5e-5}),
}
PLATEAU: dict[str, Any] = {"epochs": 8, "evaluations": 16, "eval_rows": 0, "max_length": 96}
RISE = 0.005
"""Of the mean validation accuracy between the third and the last quarter of training: one row of 212."""

SETTINGS = hashlib.sha256(repr((RECIPES, PLATEAU)).encode()).hexdigest()[:8]
RUNS = Path(__file__).parent / "results" / f"bbc-{SETTINGS}.jsonl"
"""With other recipes or another schedule the runs go into another file."""


def trial(name: str, seed: int) -> dict[str, Any]:
    """One run; ``right`` holds a character a test article, 1 where the answer is its topic."""
    method, settings = RECIPES[name]
    data = load_task("bbc-news")
    with tempfile.TemporaryDirectory() as folder:
        result = dt.train("minilm", data, method, out=Path(folder) / "run", seed=seed, progress="none", **PLATEAU, **settings)
        predictor = Predictor.open(Path(folder) / "run")
        said = [prediction.label for prediction in predictor([str(row["text"]) for row in data.test])]
    right = [data.task.labels[row["label"]] == label for row, label in zip(data.test, said, strict=True)]
    return {
        "method": name,
        "seed": seed,
        "accuracy": round(result.score, 5),
        "steps": result.steps,
        "trained_parameters": result.trainable_parameters,
        "share": round(result.trainable_parameters / result.total_parameters, 5),
        "delta_bytes": result.delta_bytes,
        "validation": [round(score, 5) for _, score in curve_of(result.history).score],
        "right": "".join(str(int(one)) for one in right),
    }


def runs() -> list[dict[str, Any]]:
    """Those that are there."""
    return [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.exists() else []


def quarters(found: list[dict[str, Any]]) -> list[float]:
    """Mean validation accuracy in each quarter of training, over the seeds."""
    curves = np.array([run["validation"] for run in found])  # (seeds, evaluations)
    return [round(float(part.mean()), 4) for part in np.array_split(curves, 4, axis=1)]


def interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of mean(ours - theirs) over resampled articles; both are (seeds, articles)."""
    difference = (ours.astype(float) - theirs.astype(float)).mean(0)
    picks = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One method's line of the table."""
    accuracies = [run["accuracy"] for run in found]
    return {
        "accuracy": round(statistics.mean(accuracies), 4),
        "std": round(statistics.stdev(accuracies), 4),
        "seeds": accuracies,
        **{key: found[0][key] for key in ("trained_parameters", "share", "steps", "delta_bytes")},
        "validation_quarters": quarters(found),
    }


if __name__ == "__main__":
    for seed in SEEDS:
        for name in RECIPES:
            if not any((run["method"], run["seed"]) == (name, seed) for run in runs()):
                run = trial(name, seed)
                with RUNS.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(run) + "\n")
                print(f"{name}, seed {seed}: {run['accuracy']:.4f} after {run['steps']} steps", file=sys.stderr, flush=True)
    found = {name: [run for run in runs() if run["method"] == name] for name in RECIPES}
    rows = {name: row(mine) for name, mine in found.items()}
    right = {name: np.array([[int(one) for one in run["right"]] for run in mine]) for name, mine in found.items()}
    plateau = all(line["validation_quarters"][3] - line["validation_quarters"][2] <= RISE for line in rows.values())
    low, high = interval(right["LoRA"], right["full fine-tuning"])
    lora = rows["LoRA"]
    report(
        "BBC News, MiniLM, test accuracy over 3 seeds: LoRA against full fine-tuning, both to their plateau",
        rows=rows,
        lora_minus_full={
            "mean": round(float((right["LoRA"] - right["full fine-tuning"]).mean()), 4),
            "interval95": [round(low, 4), round(high, 4)],
        },
        plateau=plateau,
        bars={"accuracy": 0.96, "share": 0.01, "interval_low": -0.02, "rise": RISE},
        holds=plateau and lora["accuracy"] >= 0.96 and lora["share"] < 0.01 and low >= -0.02,
    )
