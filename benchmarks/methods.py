"""Does every method learn with its own defaults, and what does it cost beside full fine-tuning?

``methods.py train`` trains every registered method on MiniLM for two real tasks, all on one budget of steps and with 3
seeds, and adds a line a run to ``results/methods/<task>.jsonl``; runs that are there already are not done again, so it
goes on where it was stopped, but those of other defaults than today's are. ``methods.py cost`` times a step and takes the
peak memory of each, in a process of its own, in turns with full fine-tuning. ``methods.py page`` counts what trains of
each and writes ``docs/methods.md`` from all this.

Bar: the lower end of a method's 95% interval (bootstrap over test rows and seeds) lies above the linear probe's mean
on at least one task; controls are exempt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from methods_runs import BACKBONE, BATCH, LENGTH, RESULTS, SEEDS, STEPS, TASKS, asked, is_stale, lines, recipe
from paired import ratio

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import methods
from deltatune.tasks import TaskData, load_task
from deltatune.tasks.framing import HeadFraming
from deltatune.training.life import Life
from deltatune.training.measure import peak_memory

ROUNDS, TOKENS = 7, 64
"""Of the timings: steps of each kind, and tokens of a text."""


def device() -> str:
    """What the numbers were taken on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def train_once(name: str, data: TaskData, seed: int, steps: int) -> dict[str, Any]:
    """One run; ``right`` holds a character a test row, 1 where the answer is the row's label."""
    with tempfile.TemporaryDirectory() as folder:
        result = dt.train(
            BACKBONE,
            data,
            recipe(name),
            out=Path(folder) / "run",
            seed=seed,
            max_steps=steps,
            batch_size=BATCH,
            max_length=LENGTH,
            evaluations=0,
            test_rows=1,
            progress="none",
        )
    framing = HeadFraming(data.task, result.tokenizer, LENGTH)
    said = framing.predict(framing.score(result.backbone, data.test, 64))
    right = [int(one == other) for one, other in zip(said, framing.references(data.test), strict=True)]
    return {
        "method": name,
        "seed": seed,
        **asked(name),
        "steps": result.steps,
        "length": LENGTH,
        "accuracy": round(sum(right) / len(right), 5),
        "trained": result.trainable_parameters,
        "total": result.total_parameters,
        "file_bytes": result.delta_bytes,
        "device": device(),
        "answers": len(set(said)),
        "right": "".join(map(str, right)),
    }


def train(names: Sequence[str], seeds: Sequence[int], steps: int) -> None:
    """Every run that is not there yet, seed by seed, so that early stopping leaves whole columns."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for task in TASKS:
            data, file = load_task(task), RESULTS / f"{task}.jsonl"
            done = {(run["method"], run["seed"]) for run in lines(file) if not is_stale(run)}
            for name in names:
                if (name, seed) in done:
                    continue
                began = time.monotonic()
                try:
                    run = train_once(name, data, seed, steps)
                except dt.errors.DeltaError as error:
                    print(f"{task} {name}: {error}", file=sys.stderr, flush=True)
                    continue
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(run) + "\n")
                print(f"{task} {name} {seed}: {run['accuracy']:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


class Trained:
    """A backbone with one method, ready for steps on one batch of random tokens."""

    def __init__(self, name: str) -> None:
        self.backbone = load_backbone(BACKBONE, auto_class="AutoModelForSequenceClassification", num_labels=5).train()
        if torch.cuda.is_available():
            self.backbone.cuda()
        self.delta = dt.attach(self.backbone, recipe(name))
        place = next(self.backbone.parameters()).device
        ids = torch.randint(1000, 20000, (BATCH, TOKENS), device=place)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(BATCH, device=place) % 5}
        self.life = Life(self.delta, 1000)
        self.life.begin([self.batch])
        self.optimizer = torch.optim.AdamW(self.delta.parameter_groups(1e-3))

    def step(self) -> float:
        """Seconds of one."""
        _wait()
        began = time.perf_counter()
        self.life.before_step()
        self.backbone(**self.batch).loss.backward()
        self.life.add_penalty()
        self.optimizer.step()
        self.life.after_step()
        self.optimizer.zero_grad()
        _wait()
        return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cost_of(name: str) -> dict[str, Any]:
    """Of one method, in this process: bytes beyond the libraries, then seconds a step in turns with full fine-tuning."""
    load_tokenizer(BACKBONE)  # the libraries are in
    torch.zeros(1).cuda() if torch.cuda.is_available() else None
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        ours = Trained(name)
        for _ in range(3):
            ours.step()
    full = Trained("full")
    full.step()
    seconds: dict[str, list[float]] = {"ours": [], "full": []}
    for _ in range(ROUNDS):
        seconds["ours"].append(ours.step())
        seconds["full"].append(full.step())
    return {"method": name, "step": round(ratio(seconds["ours"], seconds["full"]), 3), "bytes": peak.bytes - before.bytes}


def cost(names: Sequence[str]) -> None:
    """Every method in a process of its own; writes ``results/methods/cost.json``."""
    rows = {}
    for name in dict.fromkeys(["full", *names]):
        done = subprocess.run([sys.executable, __file__, "cost-of", name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
            continue
        rows[name] = json.loads(done.stdout)
        rows[name]["memory"] = round(rows[name]["bytes"] / rows["full"]["bytes"], 3)
        print(f"{name}: step {rows[name]['step']}, memory {rows[name]['memory']}", file=sys.stderr, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"device": device(), "batch": BATCH, "tokens": TOKENS, "rows": rows}
    (RESULTS / "cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ground() -> dict[str, Any]:
    """What the page needs besides the runs: how many numbers train of each method, and the truth of the test rows."""
    backbone = load_backbone(BACKBONE, auto_class="AutoModelForSequenceClassification", num_labels=5)
    trained: dict[str, int] = {}
    for name in methods:
        delta = dt.attach(backbone, recipe(name))
        trained[name], total = delta.budget().delta, delta.budget().N
        dt.detach(delta)
    found = {task: load_task(task) for task in TASKS}
    labels = {task: "".join(str(data.task.kind.reference(data.task, row)) for row in data.test) for task, data in found.items()}
    return {"total": total, "trained": trained, "labels": labels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "cost", "cost-of", "page"], nargs="?", default="train")
    parser.add_argument("names", nargs="*", help="methods; all of them if left out")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th run of a seed from the k-th on, for several processes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    given = parser.parse_args()
    chosen = given.names or [name for name in methods if name != "full"] + ["full"]
    k, n = map(int, given.part.split("/"))
    if given.verb == "train":
        train(chosen[k::n], given.seeds, given.steps)
    elif given.verb == "cost":
        cost([name for name in chosen if methods[name].trains])
    elif given.verb == "cost-of":
        print(json.dumps(cost_of(chosen[0])))
    else:
        from methods_page import write

        (RESULTS / "ground.json").write_text(json.dumps(ground(), indent=1) + "\n", encoding="utf-8")
        write()
