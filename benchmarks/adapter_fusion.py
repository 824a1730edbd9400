"""Does AdapterFusion over three adapters of real tasks serve a fourth task better than the best of them alone?

Three Pfeiffer adapters are trained on MiniLM, one a task. On few rows of the target task a fresh head then trains on
top of nothing, of each adapter alone, and of all three: added up, and fused by attention, which trains with the head.
The adapters are frozen throughout. An adapter trained on the target itself stands beside them. ``best single`` is the
adapter whose mean over the seeds is highest on the test rows, which favours it. Bar: fusion's mean is not below it.

Tasks of the mirror need ``DELTATUNE_MIRROR``. Takes about half an hour of one core; ``--steps 3 --seeds 13`` tries it out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from paired import report

import deltatune as dt
from deltatune.backbones import load_backbone
from deltatune.methods import LinearProbe, PfeifferAdapter
from deltatune.tasks import TaskData, k_shot, load_task
from deltatune.training.result import Result

LENGTH = 32
"""Most tokens of a text."""

RATE = 3e-3
"""Of the head and of the fusion: the same for all that is compared."""


def train_sources(tasks: Sequence[str], folder: Path, steps: int) -> dict[str, float]:
    """One adapter a task, saved below ``folder``; their scores on their own tasks."""
    scores = {}
    for task in tasks:
        result = dt.train(
            "minilm", task, PfeifferAdapter(), out=folder / task, max_steps=steps, max_length=LENGTH, evaluations=0, progress="none"
        )
        scores[task] = round(result.score, 4)
        print(f"{task}: {result.score:.4f}", file=sys.stderr, flush=True)
    return scores


def target_score(adapters: Sequence[Path], how: str, data: TaskData, seed: int, steps: int) -> Result:
    """Train a head on the target task over frozen adapters, and what the composition trains besides."""
    torch.manual_seed(seed)
    backbone = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", label_names=data.task.labels)
    members: list[Any] = [dt.load(backbone, folder, name=folder.name, head=False) for folder in adapters]
    for delta in members:
        delta.freeze()
    head = dt.attach(backbone, LinearProbe(), name="head")
    trained: Any = dt.compose(backbone, [*members, head], how=how) if len(members) > 1 else head  # type: ignore[arg-type]
    return dt.train(backbone, data, trained, lr=RATE, seed=seed, **options(steps))


def own_score(data: TaskData, seed: int, steps: int) -> Result:
    """An adapter and a head trained on the target task itself."""
    return dt.train("minilm", data, PfeifferAdapter(), seed=seed, **options(steps))


def options(steps: int) -> dict[str, Any]:
    """Of every training on the target task."""
    return {"max_steps": steps, "max_length": LENGTH, "evaluations": 0, "progress": "none"}


def compare(sources: Sequence[str], target: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Score and trained parameters by what acts."""
    data = load_task(target)
    places = {task: folder / task for task in sources}
    settings: dict[str, tuple[list[Path], str]] = {"head alone": ([], "")}
    settings |= {f"{task} adapter": ([place], "") for task, place in places.items()}
    settings |= {"added up": (list(places.values()), "parallel"), "fusion": (list(places.values()), "fusion")}
    rows: dict[str, Any] = {}
    for name in [*settings, "own adapter"]:
        results = []
        for seed in args.seeds:
            few = k_shot(data, args.shots, seed)
            results.append(target_score(*settings[name], few, seed, args.steps) if name in settings else own_score(few, seed, args.steps))
        scores = [result.score for result in results]
        rows[name] = {
            "score": round(statistics.mean(scores), 4),
            "seeds": [round(score, 4) for score in scores],
            "trained_parameters": results[0].trainable_parameters,
        }
        print(f"{name}: {rows[name]['score']}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=["tweet-sentiment", "bbc-news", "trec-coarse"])
    parser.add_argument("--target", default="glue-sst2")
    parser.add_argument("--shots", type=int, default=32, help="training rows a class of the target task")
    parser.add_argument("--steps", type=int, default=200, help="of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[13, 21, 42])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = train_sources(args.sources, Path(folder), args.steps)
        rows = compare(args.sources, args.target, Path(folder), args)
    singles = {name: rows[name]["score"] for name in (f"{task} adapter" for task in args.sources)}
    best = max(singles, key=lambda name: singles[name])
    report(
        f"AdapterFusion of {len(args.sources)} adapters on {args.target}, {args.shots} rows a class, MiniLM: test score, mean of the seeds",
        sources=sources,
        target=rows,
        best_single=best,
        gain=round(rows["fusion"]["score"] - singles[best], 4),
        holds=rows["fusion"]["score"] >= singles[best],
        steps=args.steps,
    )


if __name__ == "__main__":
    main()
