"""Which learning rate should a method have by default?

Trains methods on MiniLM for BBC News, or the tasks of ``--tasks``, at a third of their default rate, at it, and at three
times it, for a short budget, and measures the loss on the validation rows; the test rows stay unseen. Where the best rate
lies at an end, the sweep goes on beyond it. A run adds a line to ``results/learning_rates.jsonl`` and is not done again.
The report names each method's best rate on each task beside its default, and the rates at which it gave every row one
answer; a default within the sweep's best is confirmed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods_runs import BACKBONE, BATCH, LENGTH, TASKS, lines, recipe
from paired import report

import deltatune as dt
from deltatune.methods import methods
from deltatune.tasks import TaskData, load_task
from deltatune.tasks.framing import HeadFraming

SETTINGS: dict[str, Any] = {"batch_size": BATCH, "max_length": LENGTH, "seed": 7, "evaluations": 0, "test_rows": 1}
STEP, REACH = 3.0, 2
"""Between two rates, and how far beyond the first three the sweep may go on either side."""

RUNS = Path(__file__).parent / "results" / "learning_rates.jsonl"


@dataclass(frozen=True)
class Sweep:
    """The rates of a method on a task within a budget.

    Attributes:
        method: its name.
        task: its name.
        steps: of each run.
    """

    method: str
    task: str
    steps: int

    def runs(self) -> list[dict[str, Any]]:
        """What was tried; lines of the first sweep name neither task nor steps."""
        told = [{"task": "bbc-news", "steps": 100} | run for run in lines(RUNS)]
        return [run for run in told if (run["method"], run["task"], run["steps"]) == (self.method, self.task, self.steps)]

    def losses(self) -> dict[float, float]:
        """Rate -> validation loss; infinity where it diverged."""
        return {run["lr"]: math.inf if run["loss"] is None else run["loss"] for run in self.runs()}

    def go(self, data: TaskData) -> None:
        """Every rate that is needed and not there yet."""
        while left := list(rates(self.method, self.losses())):
            run = {"task": self.task, "steps": self.steps, **trial(self.method, left[0], data, self.steps)}
            with RUNS.open("a", encoding="utf-8") as out:
                out.write(json.dumps(run) + "\n")

    def row(self) -> dict[str, Any]:
        """The rates, and the best of them."""
        found = self.losses()
        return {
            "default": methods[self.method].learning_rate,
            "best": min(found, key=lambda rate: found[rate]),
            "losses": {f"{rate:g}": found[rate] if math.isfinite(found[rate]) else None for rate in sorted(found)},
            "one answer": [run["lr"] for run in self.runs() if run.get("answers") == 1],
        }


def trial(name: str, lr: float, data: TaskData, steps: int) -> dict[str, Any]:
    """One run; None where it diverged."""
    began = time.monotonic()
    found: dict[str, Any] = {"method": name, "lr": lr, "loss": None, "accuracy": None}
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "run"
            result = dt.train(BACKBONE, data, recipe(name), out=place, lr=lr, max_steps=steps, progress="none", **SETTINGS)
    except dt.errors.DeltaError as error:
        print(f"{data.task.name} {name} at {lr:g}: {error}", file=sys.stderr, flush=True)
        return found
    framing = HeadFraming(data.task, result.tokenizer, SETTINGS["max_length"])
    scores = torch.as_tensor(framing.score(result.backbone, data.validation, 64)).float()
    labels = torch.tensor([row["label"] for row in data.validation])
    found["loss"] = round(float(torch.nn.functional.cross_entropy(scores, labels)), 4)
    found["accuracy"] = round(float((scores.argmax(1) == labels).float().mean()), 4)
    found["answers"] = len(scores.argmax(1).unique())
    told = f"loss {found['loss']:.3f}, {found['accuracy']:.3f}, {found['answers']} answers, {time.monotonic() - began:.0f} s"
    print(f"{data.task.name} {name} at {lr:g}: {told}", file=sys.stderr, flush=True)
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
    new = [rate for rate in beside if not any(math.isclose(rate, tried, rel_tol=0.05) for tried in found)]
    return [rate for rate in new if limits[0] * 0.99 <= rate <= limits[1] * 1.01]


def rate_at(middle: float, k: int) -> float:
    """``k`` steps from the middle, to two digits."""
    return float(f"{middle * STEP**k:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; all that train if left out")
    parser.add_argument("--tasks", nargs="*", default=TASKS[:1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--part", default="0/1", help="k/n: every n-th of them from the k-th on, for several processes")
    given = parser.parse_args()
    chosen = given.names or [name for name in methods if methods[name].trains]
    k, n = map(int, given.part.split("/"))
    for task in given.tasks:
        data = load_task(task)
        for name in chosen[k::n]:
            Sweep(name, task, given.steps).go(data)
    sweeps = [Sweep(name, task, given.steps) for task in given.tasks for name in chosen]
    rows = {f"{sweep.task} {sweep.method}": sweep.row() for sweep in sweeps if sweep.runs()}
    report(f"Learning rates: validation loss after {given.steps} steps", rows=rows)
