"""Write ``docs/methods.md`` from ``results/methods``: every method's score on two real tasks, its size and its cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from methods_runs import BATCH, REQUIRED, RESULTS, SEEDS, TASKS, Run, collapsed, is_stale, read, recipe, runs_of

from deltatune.methods import methods
from deltatune.methods.fields import in_short, summary_of
from deltatune.methods.making import settings_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
PACKAGED = ROOT / "deltatune" / "methods" / "measured.json"
FAMILIES = ("addition", "specification", "reparameterization", "baseline")
PROBE = "linear-probe"
DRAWS = 4000
REASONS: dict[str, str] = {}
"""Method that is above the linear probe on no task -> why its defaults miss it within the budget, and which setting does not."""


@dataclass(frozen=True)
class Score:
    """A method on one task.

    Attributes:
        mean: accuracy over the seeds.
        spread: standard deviation over the seeds; None with one.
        low: lower end of the 95% interval of the mean.
        seeds: how many.
        collapsed: with how many of them it gave every test row the same answer.
        stale: a run had other defaults than today's.
    """

    mean: float
    spread: float | None
    low: float
    seeds: int
    collapsed: int = 0
    stale: bool = False

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")

    @property
    def marks(self) -> str:
        """What a reader must know beside the number."""
        told = [f"{self.seeds} seed{'s' * (self.seeds > 1)}"] if self.seeds < len(SEEDS) else []
        if self.collapsed:
            told.append("one answer" if self.collapsed == self.seeds else f"one answer with {self.collapsed} of {self.seeds} seeds")
        if self.stale:
            told.append("stale")
        return f" ({', '.join(told)})" if told else ""


@cache
def draws(count: int) -> np.ndarray[Any, Any]:
    """How often each of so many things is drawn, (DRAWS, count), with replacement; the same for every method."""
    return np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)


def score_of(runs: Sequence[Run], labels: str) -> Score:
    """Mean, spread and interval; the bootstrap draws test rows, the same ones for every seed, and seeds."""
    right = np.array([[int(one) for one in run["right"]] for run in runs], dtype=float)  # (seeds, rows)
    seeds, rows = right.shape
    means = ((draws(rows) @ right.T) * draws(seeds)).sum(1) / right.size  # (DRAWS,)
    each = right.mean(1)
    return Score(
        mean=float(each.mean()),
        spread=statistics.stdev(each) if seeds > 1 else None,
        low=float(np.quantile(means, 0.025)),
        seeds=seeds,
        collapsed=sum(collapsed(run, labels) for run in runs),
        stale=any(map(is_stale, runs)),
    )


def scores(results: Path = RESULTS) -> dict[str, dict[str, Score]]:
    """Task -> method -> score."""
    labels = read("ground", results)["labels"]
    return {task: {name: score_of(runs, labels[task]) for name, runs in runs_of(task, results).items()} for task in TASKS}


def learns(name: str, found: Mapping[str, Mapping[str, Score]]) -> bool:
    """Above the linear probe's mean on at least one task."""
    return any(name in task and task[name].low > task[PROBE].mean for task in found.values() if PROBE in task)


def misses(name: str, found: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """The tasks where a method's interval is not above the linear probe's mean, or it gave one answer with some seed."""
    tasks = [task for task, by in found.items() if name in by and PROBE in by]
    return [task for task in tasks if found[task][name].low <= found[task][PROBE].mean or found[task][name].collapsed]


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    found = scores(results)
    lines = ["# Every method, measured", "", *_heading(results), ""]
    for family in FAMILIES:
        lines += [f"## {family.capitalize()}", "", *_table(family, found, results), ""]
    reasons = [_reason(name, tasks, found) for name in methods if methods[name].family != "baseline" and (tasks := misses(name, found))]
    if reasons:
        lines += ["## Not above the linear probe", "", _said_of(found), "", *reasons, ""]
    return "\n".join(lines + _fusion(results))


def _said_of(found: Mapping[str, Mapping[str, Score]]) -> str:
    """Whether every method is above the probe somewhere, which is the bar."""
    below = [f"`{name}`" for name in methods if methods[name].family != "baseline" and not learns(name, found)]
    there = "every method does so" if not below else f"all but {', '.join(below)} do so"
    return f"A method has to lie above the probe with its whole interval on one of the tasks: {there}. These do not on both:"


def _fusion(results: Path) -> list[str]:
    """AdapterFusion beside the adapters it fuses, where it was measured."""
    told = read("adapter_fusion", results)
    if not told:
        return []
    rows = [
        f"| {name}{', the best single one' if name == told['best_single'] else ''} | {row['score']:.3f} | "
        f"{', '.join(f'{score:.3f}' for score in row['seeds'])} | {row['trained_parameters']:,} |"
        for name, row in told["target"].items()
    ]
    sources = ", ".join(f"{task} {score:.3f}" for task, score in told["sources"].items())
    return [
        "## AdapterFusion",
        "",
        f"{told['question']}. By `benchmarks/adapter_fusion.py`, {told['steps']} steps each. The adapters, with their scores on their own "
        f"tasks: {sources}. Fusion less the best single adapter: {told['gain']:+.4f}.",
        "",
        "| on top of | score | by seed | trained |",
        "|---|--:|---|--:|",
        *rows,
        "",
    ]


def _heading(results: Path) -> list[str]:
    ground, cost = read("ground", results), read("cost", results)
    runs = [run for task in TASKS for by in runs_of(task, results).values() for run in by if run["steps"]]
    steps, lengths, seeds, devices = (_listed(run[name] for run in runs) for name in ("steps", "length", "seed", "device"))
    timed = f"on {cost['batch']} texts of {cost['tokens']} tokens, {cost['device']}" if cost else "not yet"
    return [
        "Written by `benchmarks/methods.py page`; every figure comes from a run of `benchmarks/methods.py train` or `cost`.",
        "",
        f"MiniLM, every method with its own defaults and the same budget: {steps} steps of {BATCH} texts of up to {lengths} tokens, "
        f"seeds {seeds}, on {devices}. Accuracy on all test rows: mean and standard deviation over the seeds; a score of fewer than "
        f"{len(SEEDS)} says so. **Bold**: the lower end of the 95% interval (bootstrap over test rows and seeds) lies above the linear "
        "probe's mean. *One answer*: the same to every test row. *Stale*: a run had other defaults than today's. "
        f"`trainable-tokens` has no default for its tokens; it trained {len(REQUIRED['token_ids']):,} of the commonest words.",
        "",
        f"*Trained* is the share of the {ground['total']:,} parameters of the backbone with its head that trains, counted before the "
        "first step, so with a prefix's MLP, a mask's scores or diff pruning's gates; *file* is what is left of it on disk. Both are those "
        f"of the five-topic task, its head of {ground['trained'][PROBE]:,} numbers included. *Step* (seconds) and *memory* (peak) are "
        f"ratios to full fine-tuning, measured in turns with it: {timed}.",
    ]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values)))) or "none"


def _table(family: str, found: Mapping[str, Mapping[str, Score]], results: Path) -> list[str]:
    ground, costs = read("ground", results), read("cost", results).get("rows", {})
    files = _file_bytes(results)
    tasks = list(found)
    lines = [f"| method | what it is | {' | '.join(tasks)} | trained | file | step | memory |", f"|---|---|{'--:|' * (len(tasks) + 4)}"]
    for name in methods:
        if methods[name].family != family:
            continue
        cells = [_cell(found[task].get(name), found[task].get(PROBE)) for task in tasks]
        sizes = (f"{_share(name, ground):.3%}", f"{files[name] / 1e3:,.0f} kB" if name in files else "-")
        cost = (f"{costs[name]['step']:.2f}", f"{costs[name]['memory']:.2f}") if name in costs else ("-", "-")
        lines.append(f"| `{name}` | {summary_of(methods[name])} | {' | '.join([*cells, *sizes, *cost])} |")
    return lines


def _share(name: str, ground: Mapping[str, Any]) -> float:
    return float(ground["trained"][name] / ground["total"])


def _cell(score: Score | None, probe: Score | None) -> str:
    if score is None:
        return "-"
    return (f"**{score}**" if probe is not None and score.low > probe.mean else str(score)) + score.marks


def _file_bytes(results: Path) -> dict[str, int]:
    """Method -> bytes of its delta's folder on the five-topic task."""
    return {name: runs[0]["file_bytes"] for name, runs in runs_of(TASKS[0], results).items()}


def _reason(name: str, tasks: Sequence[str], found: Mapping[str, Mapping[str, Score]]) -> str:
    told = [f"{task} {found[task][name].mean:.3f}{found[task][name].marks}, the probe {found[task][PROBE].mean:.3f}" for task in tasks]
    why = "" if learns(name, found) else f" {REASONS.get(name, 'No reason is known yet.')}"
    return f"- `{name}`: {'; '.join(told)}.{why}"


def packaged(results: Path = RESULTS) -> dict[str, Any]:
    """The same figures for ``deltatune methods show``."""
    found, ground, files, costs = scores(results), read("ground", results), _file_bytes(results), read("cost", results).get("rows", {})
    steps = max(run["steps"] for runs in runs_of(TASKS[0], results).values() for run in runs)
    rows = {
        name: {
            "settings": in_short(name, settings_of(recipe(name))).removeprefix(name).strip(),
            "scores": {task: (round(by[name].mean, 4), _rounded(by[name].spread)) for task, by in found.items() if name in by},
            "collapsed": {task: (by[name].collapsed, by[name].seeds) for task, by in found.items() if name in by and by[name].collapsed},
            "share": round(_share(name, ground), 6),
            "file_bytes": files[name],
            "step": costs.get(name, {}).get("step"),
            "memory": costs.get(name, {}).get("memory"),
        }
        for name in sorted(files)
    }
    return {"budget": f"MiniLM, {steps} steps of {BATCH}", "rows": rows}


def _rounded(spread: float | None) -> float | None:
    return None if spread is None else round(spread, 4)


def written(results: Path = RESULTS) -> dict[Path, str]:
    """The files that are made of the results, and what is to stand in them."""
    return {PAGE: page(results), PACKAGED: json.dumps(packaged(results), indent=1) + "\n"}


def write() -> None:
    """Write the page, and what the package tells of it."""
    for file, text in written().items():
        file.write_text(text, encoding="utf-8")
