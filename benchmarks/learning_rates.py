"""Which learning rate should a method have by default?

Trains methods on MiniLM for BBC News at a third of their default rate, at it, and at three times it, for a short budget,
and measures the loss on the validation rows; the test rows stay unseen. Where the best rate lies at an end, the sweep goes
on beyond it. A run adds a line to ``results/learning_rates.jsonl`` and is not done again. The report names each method's
best rate beside its default; a default within the sweep's best is confirmed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import lines, recipe
from paired import report

import deltatune as dt
from deltatune.methods import methods
from deltatune.tasks import TaskData, load_task
from deltatune.tasks.framing import HeadFraming

SETTINGS: dict[str, Any] = {"max_steps": 100, "batch_size": 16, "max_length": 32, "seed": 7, "evaluations": 0, "test_rows": 1}
STEP, REACH = 3.0, 2
"""Between two rates, and how far beyond the first three the sweep may go on either side."""

RUNS = Path(__file__).parent / "results" / "learning_rates.jsonl"


def trial(name: str, lr: float, data: TaskData) -> dict[str, Any]:
    """One run; NaN where it diverged."""
    began = time.monotonic()
    found: dict[str, Any] = {"method": name, "lr": lr, "loss": None, "accuracy": None}
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = dt.train("minilm", data, recipe(name), out=Path(folder) / "run", lr=lr, progress="none", **SETTINGS)
    except dt.errors.DeltaError as error:
        print(f"{name} at {lr:g}: {error}", file=sys.stderr, flush=True)
        return found
    framing = HeadFraming(data.task, result.tokenizer, SETTINGS["max_length"])
    scores = torch.as_tensor(framing.score(result.backbone, data.validation, 64)).float()
    labels = torch.tensor([row["label"] for row in data.validation])
    found["loss"] = round(float(torch.nn.functional.cross_entropy(scores, labels)), 4)
    found["accuracy"] = round(float((scores.argmax(1) == labels).float().mean()), 4)
    print(
        f"{name} at {lr:g}: loss {found['loss']:.3f}, {found['accuracy']:.3f}, {time.monotonic() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


def rates(name: str, found: dict[float, float]) -> Iterable[float]:
    """The rates that are still to be tried, from what was found (rate -> loss) so far."""
    middle = methods[name].learning_rate
    first = [rate_at(middle, k) for k in (0, -1, 1)]
    if any(rate not in found for rate in first):
        return [rate for rate in first if rate not in found]
    best = min(found, key=lambda rate: found[rate])
    beside = [rate_at(best, k) for k in (-1, 1)]
    limits = rate_at(middle, -1 - REACH), rate_at(middle, 1 + REACH)
    return [rate for rate in beside if rate not in found and limits[0] * 0.99 <= rate <= limits[1] * 1.01]


def rate_at(middle: float, k: int) -> float:
    """``k`` steps from the middle, to two digits."""
    return float(f"{middle * STEP**k:.1e}")


def sweep(names: Sequence[str]) -> None:
    """Every rate that is needed and not there yet."""
    data = load_task("bbc-news")
    for name in names:
        while left := list(rates(name, losses(name))):
            run = trial(name, left[0], data)
            with RUNS.open("a", encoding="utf-8") as out:
                out.write(json.dumps(run) + "\n")


def losses(name: str) -> dict[float, float]:
    """Rate -> validation loss; infinity where it diverged."""
    return {run["lr"]: float("inf") if run["loss"] is None else run["loss"] for run in lines(RUNS) if run["method"] == name}


def row(name: str) -> dict[str, Any]:
    """One method's rates."""
    found = losses(name)
    best = min(found, key=lambda rate: found[rate])
    default = methods[name].learning_rate
    return {
        "default": default,
        "best": best,
        "losses": {f"{rate:g}": found[rate] if math.isfinite(found[rate]) else None for rate in sorted(found)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; all that train if left out")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th of them from the k-th on, for several processes")
    asked = parser.parse_args()
    chosen = asked.names or [name for name in methods if methods[name].trains]
    k, n = map(int, asked.part.split("/"))
    sweep(chosen[k::n])
    report("Learning rates: validation loss on BBC News after 100 steps", rows={name: row(name) for name in chosen if losses(name)})
