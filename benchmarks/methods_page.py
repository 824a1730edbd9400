"""Write ``docs/methods.md`` from ``results/methods``: every method's score on two real tasks, its size and its cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltatune.methods import methods
from deltatune.methods.fields import summary_of

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "methods"
PAGE = HERE.parent / "docs" / "methods.md"
PACKAGED = HERE.parent / "deltatune" / "methods" / "measured.json"
FAMILIES = ("addition", "specification", "reparameterization", "baseline")
DRAWS = 4000
REASONS: dict[str, str] = {}
"""Method -> why its defaults do not beat the linear probe within the budget, and what setting does."""


@dataclass(frozen=True)
class Score:
    """A method on one task.

    Attributes:
        mean: accuracy over the seeds.
        spread: standard deviation over the seeds; None with one.
        low: lower end of the 95% interval of the mean.
        seeds: how many.
    """

    mean: float
    spread: float | None
    low: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.spread is None else f" ± {self.spread:.3f}")


def score_of(runs: Sequence[Mapping[str, Any]]) -> Score:
    """Mean, spread and interval; the bootstrap draws test rows, the same ones for every seed, and seeds."""
    right = np.array([[int(one) for one in run["right"]] for run in runs], dtype=float)  # (seeds, rows)
    generator = np.random.default_rng(0)
    seeds, rows = right.shape
    means = [right[generator.integers(seeds, size=seeds)][:, generator.integers(rows, size=rows)].mean() for _ in range(DRAWS)]
    each = right.mean(1)
    return Score(float(each.mean()), statistics.stdev(each) if seeds > 1 else None, float(np.quantile(means, 0.025)), seeds)


def scores(results: Path = RESULTS) -> dict[str, dict[str, Score]]:
    """Task -> method -> score."""
    found: dict[str, dict[str, Score]] = {}
    for file in sorted(results.glob("*.jsonl")):
        runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        names = dict.fromkeys(run["method"] for run in runs)
        found[file.stem] = {name: score_of([run for run in runs if run["method"] == name]) for name in names}
    return found


def learns(name: str, found: Mapping[str, Mapping[str, Score]]) -> bool:
    """Above the linear probe's mean on at least one task."""
    return any(name in task and task[name].low > task["linear-probe"].mean for task in found.values() if "linear-probe" in task)


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    found, sizes = scores(results), _sizes(results)
    costs = json.loads((results / "cost.json").read_text(encoding="utf-8")) if (results / "cost.json").exists() else {"rows": {}}
    runs = [json.loads(line) for file in results.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    steps, lengths, devices = (sorted({run[name] for run in runs}) for name in ("steps", "length", "device"))
    lines = [
        "# Every method, measured",
        "",
        "Written by `benchmarks/methods.py page`; every figure comes from a run of `benchmarks/methods.py train` or `cost`.",
        "",
        f"MiniLM, every method with its own defaults and the same budget: {_listed(steps)} steps of 16 texts of up to "
        f"{_listed(lengths)} tokens, on {_listed(devices)}. Accuracy on all test rows: mean and standard deviation over seeds. "
        "**Bold**: the lower end of the 95% interval (bootstrap over test rows and seeds) lies above the linear probe's mean. "
        "Trained share and file size are those of the five-topic task, the head of 149,765 numbers included. Seconds a step and "
        f"peak memory are ratios to full fine-tuning, measured in turns with it on {costs.get('device', 'no machine yet')}.",
        "",
    ]
    for family in FAMILIES:
        lines += [f"## {family.capitalize()}", "", *_table(family, found, sizes, costs["rows"]), ""]
    reasons = [f"- `{name}`: {REASONS.get(name, 'no reason is known yet.')}" for name in _failing(found)]
    if reasons:
        lines += ["## Not above the linear probe", "", *reasons, ""]
    return "\n".join(lines)


def _listed(values: Sequence[Any]) -> str:
    return "; ".join(map(str, values))


def _table(
    family: str, found: Mapping[str, Mapping[str, Score]], sizes: Mapping[str, Mapping[str, Any]], costs: Mapping[str, Any]
) -> list[str]:
    tasks = list(found)
    lines = [f"| method | what it is | {' | '.join(tasks)} | trained | file | step | memory |", f"|---|---|{'--:|' * (len(tasks) + 4)}"]
    for name in methods:
        if methods[name].family != family:
            continue
        cells = [_bold(found[task].get(name), found[task].get("linear-probe")) for task in tasks]
        size = sizes.get(name)
        shares = ("-", "-") if size is None else (f"{size['trained'] / size['total']:.3%}", f"{size['file_bytes'] / 1e3:,.0f} kB")
        cost = (f"{costs[name]['step']:.2f}", f"{costs[name]['memory']:.2f}") if name in costs else ("-", "-")
        lines.append(f"| `{name}` | {summary_of(methods[name])} | {' | '.join([*cells, *shares, *cost])} |")
    return lines


def _bold(score: Score | None, probe: Score | None) -> str:
    if score is None:
        return "-"
    return f"**{score}**" if probe is not None and score.low > probe.mean else str(score)


def _sizes(results: Path) -> dict[str, dict[str, Any]]:
    """Method -> its first run on the five-topic task."""
    file = results / "bbc-news.jsonl"
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return {run["method"]: run for run in reversed(runs)}


def _failing(found: Mapping[str, Mapping[str, Score]]) -> list[str]:
    measured = {name for task in found.values() for name in task}
    return [name for name in methods if name in measured and methods[name].family != "baseline" and not learns(name, found)]


def packaged(results: Path = RESULTS) -> dict[str, Any]:
    """The same figures for ``deltatune methods show``."""
    found, sizes = scores(results), _sizes(results)
    costs = json.loads((results / "cost.json").read_text(encoding="utf-8"))["rows"] if (results / "cost.json").exists() else {}
    steps = max(run["steps"] for run in sizes.values())
    rows = {
        name: {
            "scores": {task: (round(by[name].mean, 4), _rounded(by[name].spread)) for task, by in found.items() if name in by},
            "share": round(size["trained"] / size["total"], 6),
            "file_bytes": size["file_bytes"],
            "step": costs.get(name, {}).get("step"),
            "memory": costs.get(name, {}).get("memory"),
        }
        for name, size in sizes.items()
    }
    return {"budget": f"MiniLM, {steps} steps of 16", "rows": {name: rows[name] for name in sorted(rows)}}


def _rounded(spread: float | None) -> float | None:
    return None if spread is None else round(spread, 4)


def write() -> None:
    """Write the page, and what the package tells of it."""
    PAGE.write_text(page(), encoding="utf-8")
    PACKAGED.write_text(json.dumps(packaged(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
