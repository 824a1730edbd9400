"""Is LoRA on MiniLM as good as full fine-tuning on BBC News, with under 1% of the parameters?

Both train to their plateau, with 3 seeds: for four epochs, in which the learning rate falls to nothing, scored twelve
times on the way; the last four scores, mean over seeds, must not lie more than half a point above the four before
them. Bars: LoRA's mean test accuracy is at least 0.96, and it is not worse than full fine-tuning by more than 2 points:
the lower end of a paired bootstrap interval (95%, over test articles, the seeds of an article kept together) of the
difference lies above -0.02. Takes about forty minutes on two cores.
"""

from __future__ import annotations

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
PLATEAU: dict[str, Any] = {"epochs": 4, "evaluations": 12, "eval_rows": 0, "max_length": 96}
RISE = 0.005
"""Of the mean validation accuracy between the middle and the last third of training: less than one row in 200 is none."""


def trial(method: Method, settings: dict[str, Any], seed: int) -> tuple[dt.Result, np.ndarray]:
    """One run, and which test articles it got right."""
    data = load_task("bbc-news")
    with tempfile.TemporaryDirectory() as folder:
        result = dt.train("minilm", data, method, out=Path(folder) / "run", seed=seed, progress="none", **PLATEAU, **settings)
        predictor = Predictor.open(Path(folder) / "run")
        texts = [str(row["text"]) for row in data.test]
        said = [prediction.label for prediction in predictor(texts)]
    names = data.task.labels
    return result, np.array([names[row["label"]] == label for row, label in zip(data.test, said, strict=True)])


def thirds(results: list[dt.Result]) -> list[float]:
    """Mean validation accuracy in each third of training, over the seeds."""
    curves = np.array([[score for _, score in curve_of(result.history).score] for result in results])  # (seeds, evaluations)
    return [round(float(part.mean()), 4) for part in np.array_split(curves, 3, axis=1)]


def interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of mean(ours - theirs) over resampled articles; both are (seeds, articles)."""
    difference = (ours.astype(float) - theirs.astype(float)).mean(0)
    picks = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    runs: dict[str, list[tuple[dt.Result, np.ndarray]]] = {name: [] for name in RECIPES}
    for seed in SEEDS:
        for name, (method, settings) in RECIPES.items():
            runs[name].append(trial(method, settings, seed))
            result = runs[name][-1][0]
            print(f"{name}, seed {seed}: {result.score:.4f} after {result.steps} steps", file=sys.stderr, flush=True)
    rows, right = {}, {}
    for name, found in runs.items():
        results = [result for result, _ in found]
        right[name] = np.stack([correct for _, correct in found])
        rows[name] = {
            "accuracy": round(statistics.mean(result.score for result in results), 4),
            "std": round(statistics.stdev(result.score for result in results), 4),
            "seeds": [round(result.score, 4) for result in results],
            "trained_parameters": results[0].trainable_parameters,
            "share": round(results[0].trainable_parameters / results[0].total_parameters, 5),
            "steps": results[0].steps,
            "validation_thirds": thirds(results),
            "delta_bytes": results[0].delta_bytes,
        }
    plateau = all(row["validation_thirds"][2] - row["validation_thirds"][1] <= RISE for row in rows.values())
    low, high = interval(right["LoRA"], right["full fine-tuning"])
    difference = float((right["LoRA"].astype(float) - right["full fine-tuning"]).mean())
    lora = rows["LoRA"]
    report(
        "BBC News, MiniLM, test accuracy over 3 seeds: LoRA against full fine-tuning, both to their plateau",
        rows=rows,
        lora_minus_full={"mean": round(difference, 4), "interval95": [round(low, 4), round(high, 4)]},
        plateau=plateau,
        bars={"accuracy": 0.96, "share": 0.01, "interval_low": -0.02, "rise": RISE},
        holds=plateau and lora["accuracy"] >= 0.96 and lora["share"] < 0.01 and low >= -0.02,
    )
