"""Experiment 11: how do methods compare when there are only a few examples of each class?"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, level
from deltatune.study.experiments.performance import AP, BF, FT, LR, PF, PROBE, PT
from deltatune.study.experiments.performance import design as performance
from deltatune.study.plots.series import draw_series
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import mean_of

TASKS = (
    "bbc-news", "tweet-sentiment", "glue-sst2", "glue-cola", "glue-mrpc", "glue-qnli", "ag-news", "clickbait", "subj", "glue-rte",
)  # fmt: skip
SHOTS = {"quick": (4, 16), "full": (8, 16, 64, 256, 1024)}
"""Examples of each class; the mirror has 4,000 in all."""


def design(profile: Profile) -> Study:
    """The methods of experiment 1 on fewer tasks, with few examples and with many."""
    base = performance(profile)
    methods = tuple(replace(entry, settings={}) for entry in base.methods if entry.label in (FT, LR, AP, PF, PT, BF, PROBE))
    settings = {"max_steps": 600, "evaluations": 12, "early_stopping": 6, "max_length": 64} if profile == "full" else base.settings
    return replace(
        base,
        name=f"low-data-{profile}",
        experiment="low-data",
        tasks=tuple(TASKS) if profile == "full" else base.tasks,
        methods=methods,
        settings=settings,
        grid={"shots": SHOTS[profile]},
        seeds=(13, 21, 42) if profile == "full" else (13,),
    )


def at(evidence: Evidence, shots: int) -> Evidence:
    """What the trials with so many examples say."""
    return evidence.narrowed(lambda record: record.cell.get("shots") == shots)


def keeps_up(evidence: Evidence) -> Judgement:
    """LoRA, adapter and BitFit level with full fine-tuning, or better, at the fewest examples."""
    shots = [value for value in evidence.study.grid.get("shots", ()) if value is not None]
    if not shots:
        return Judgement("undecided", "The study has no `shots` in its grid.")
    fewest = min(shots)
    scores = at(evidence, fewest).scores()
    told = []
    for method in (LR, AP, BF):
        one = level(scores, method, FT, 0.03)
        ahead = one.verdict == "does not hold" and f"{method} - {FT} = +" in one.because
        told.append(Judgement("holds", one.because) if ahead else one)
    return all_of([Judgement(one.verdict, f"With {fewest} of each class: {one.because}") for one in told])


def sections(evidence: Evidence) -> list[Section]:
    """Mean score by number of examples."""
    shots = [value for value in evidence.study.grid.get("shots", ()) if value is not None and at(evidence, value).done]
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    rows = []
    for method in evidence.methods:
        cells = [method]
        for value in shots:
            found = [row[method] for row in at(evidence, value).scores().values() if method in row]
            if not found:
                cells.append("-")
                continue
            mean = mean_of(found)
            lines.setdefault(method, []).append((float(value), mean.value, mean.low, mean.high))
            cells.append(f"{fmean(found):.3f}")
        rows.append(cells)
    if not lines:
        return []
    picture = Picture(
        "shots", draw_series(lines, evidence.methods, "examples of each class", "mean score"), "Mean score over tasks, with 95 % intervals."
    )
    return [Section("Score by number of examples", "", (Table(("method", *map(str, shots)), rows), picture))]


CLAIMS = (Claim("E29", "With few examples, LoRA, adapter and BitFit keep up with full fine-tuning (within 0.03).", keeps_up),)

experiments.register("low-data")(Experiment("low-data", "How do methods compare with only a few examples?", design, CLAIMS, sections))
