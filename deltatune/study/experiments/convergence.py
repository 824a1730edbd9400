"""Experiment 2: how fast does each method get there, in steps and in seconds?

Full: ten tasks on MiniLM with a head, five methods, 20 epochs of 128 rows for all: 84 trials with the baselines, about two core-hours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import AP, FT, LR, PF, PT, SAMPLE, SHORT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, lacking
from deltatune.study.plots.curves import curves_of, draw_curves
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, grouped, paired

GOAL = 0.95
"""Share of full fine-tuning's best validation score that has to be reached."""

NEVER = math.inf

TASKS = (*SHORT, "trec-coarse", "atis-intent", "stsb", "glue-mrpc")

COURSE = {**SAMPLE, "epochs": 20, "evaluations": 40}
"""Twice an epoch."""


@dataclass(frozen=True)
class Arrival:
    """When a trial reached the goal.

    Attributes:
        steps: of the optimiser; infinite if never.
        seconds: the same by the median step.
    """

    steps: float
    seconds: float


def design(profile: Profile) -> Study:
    """Five methods with validation at regular steps, as many for all; no early stop cuts a curve short."""
    base = basis(profile)
    settings = COURSE if profile == "full" else {**base.settings, "evaluations": 5}
    methods = tuple(replace(entry, settings={}) for entry in base.methods if entry.label in (FT, LR, AP, PF, PT))
    tasks = TASKS if profile == "full" else base.tasks
    return replace(base, name=f"convergence-{profile}", experiment="convergence", tasks=tasks, methods=methods, settings=settings)


def arrivals(evidence: Evidence) -> dict[str, dict[str, Arrival]]:
    """Task -> method -> when the mean curve over seeds reached the goal; tasks without full fine-tuning are left out."""
    found: dict[str, dict[str, Arrival]] = {}
    for task, records in grouped(evidence.done, lambda record: record.task).items():
        curves = {
            method: curves_of([evidence.curve(record.key) for record in own])
            for method, own in grouped(records, lambda one: one.method).items()
        }
        if not curves.get(FT):
            continue
        if (goal := GOAL * max(score for _, score in curves[FT])) <= 0:
            continue  # full fine-tuning learnt nothing, so there is nowhere to get to
        paces = {record.method: record.seconds_per_step or 0.0 for record in records}
        found[task] = {method: _arrival(curve, goal, paces[method]) for method, curve in curves.items() if curve}
    return found


def _arrival(curve: tuple[tuple[int, float], ...], goal: float, pace: float) -> Arrival:
    step = next((step for step, score in curve if score >= goal), NEVER)
    return Arrival(step, step * pace)


def speeds(found: Mapping[str, Mapping[str, Arrival]]) -> Scores:
    """Task -> method -> minus the steps to the goal as a share of the longest that any method took; never is twice that."""
    table: Scores = {}
    for task, row in found.items():
        longest = max((one.steps for one in row.values() if one.steps < NEVER), default=1.0)
        table[task] = {method: -min(one.steps / longest, 2.0) for method, one in row.items()}
    return table


def order(evidence: Evidence) -> Judgement:
    """FT before adapter and LoRA, these before prefix tuning: a significant reversal decides against it."""
    scores = speeds(arrivals(evidence))
    if (found := lacking(scores, (FT, LR, AP, PF))) is not None:
        return found
    pairs = paired(scores, [(FT, AP), (FT, LR), (AP, PF), (LR, PF)])
    said = "; ".join(
        f"{one.method} earlier than {one.other} on {one.wins:g} of {one.tasks} tasks (p = {one.corrected:.2g})" for one in pairs
    )
    if any(one.difference < 0 and one.is_significant for one in pairs):
        return Judgement("does not hold", f"{said}.")
    return Judgement("holds" if all(one.difference > 0 and one.is_significant for one in pairs) else "undecided", f"{said}.")


def prompts_are_slow(evidence: Evidence) -> Judgement:
    """Prompt tuning comes later than each of the others."""
    scores = speeds(arrivals(evidence))
    others = (FT, LR, AP, PF)
    if (found := lacking(scores, (*others, PT))) is not None:
        return found
    pairs = paired(scores, [(other, PT) for other in others])
    told = [
        Judgement(
            "holds" if one.is_significant and one.difference > 0 else "does not hold" if one.is_significant else "undecided",
            f"{one.method} earlier on {one.wins:g} of {one.tasks} tasks (p = {one.corrected:.2g}).",
        )
        for one in pairs
    ]
    return all_of(told)


def sections(evidence: Evidence) -> list[Section]:
    """When the goal is reached, and the curves."""
    found = arrivals(evidence)
    if not found:
        return []
    rows = []
    for method in evidence.methods:
        own = [row[method] for row in found.values() if method in row]
        if not own:
            continue
        there = sum(one.steps < NEVER for one in own)
        middle = median(one.steps for one in own)
        seconds = median(one.seconds for one in own)
        rows.append((method, f"{there} of {len(own)}", _shown(middle, "{:,.0f}"), _shown(seconds, "{:,.1f}")))
    note = f"The goal is {GOAL:.0%} of full fine-tuning's best validation score on the task; medians over tasks, never counts as infinite."
    curves = {
        method: [curves_of([evidence.curve(record.key)]) for record in own]
        for method, own in grouped(evidence.done, lambda record: record.method).items()
    }
    picture = Picture("curves", draw_curves(curves, evidence.methods), "Validation score by optimiser step, the mean over tasks.")
    return [Section("Time to the goal", "", (Table(("method", "tasks that get there", "steps", "seconds"), rows, note=note), picture))]


def _shown(value: float, form: str) -> str:
    return "never" if value == NEVER else form.format(value)


CLAIMS = (
    Claim("E5", "Full fine-tuning converges first, adapter and LoRA next, prefix tuning after them.", order),
    Claim("E5", "Prompt tuning is slowest.", prompts_are_slow),
)

experiments.register("convergence")(Experiment("convergence", "How fast does each method get there?", design, CLAIMS, sections))
