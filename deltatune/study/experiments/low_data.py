"""Experiment 11: how do methods compare when there are only a few examples, and what do prompts gain from more of them?

Full: eight tasks on MiniLM with a head, seven methods, two draws of 16, 128 and 1,024 training rows, up to 400 steps of 8: 432 trials with
the baselines, about four core-hours. All are validated on the same rows, which are more than a user with 16 examples would have. What
prompts gain from a larger model takes a ladder of sizes in the study's ``backbones``.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, PROBE, PT, SAMPLE, SHORT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better, lacking, level
from deltatune.study.experiments.scale import on_ladder, units
from deltatune.study.plots.series import draw_series
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import complete, mean_of

EXAMPLES = {"quick": (8, 32), "full": (16, 128, 1024)}
"""Training rows in all."""

SETTINGS = {**SAMPLE, "max_steps": 400, "evaluations": 20, "early_stopping": 4}


def design(profile: Profile) -> Study:
    """The methods of experiment 1 on fewer tasks, with few examples and with many."""
    base = basis(profile)
    methods = tuple(replace(entry, settings={}) for entry in base.methods if entry.label in (FT, LR, AP, PF, PT, BF, PROBE))
    return replace(
        base,
        name=f"low-data-{profile}",
        experiment="low-data",
        tasks=SHORT if profile == "full" else base.tasks,
        methods=methods,
        settings=SETTINGS if profile == "full" else base.settings,
        grid={"train_rows": EXAMPLES[profile], "shots_seed": (13, 21) if profile == "full" else (13,)},
        seeds=(13,),
    )


def at(evidence: Evidence, examples: int) -> Evidence:
    """What the trials with so many examples say, on the study's last backbone."""
    return evidence.narrowed(lambda record: record.cell.get("train_rows") == examples and record.backbone == evidence.study.backbones[-1])


def keeps_up(evidence: Evidence) -> Judgement:
    """LoRA, adapter and BitFit level with full fine-tuning, or better, at the fewest examples."""
    examples = evidence.study.grid.get("train_rows")
    if not examples:
        return Judgement("undecided", "The study has no `train_rows` in its grid.")
    fewest = min(examples)
    scores = at(evidence, fewest).scores()
    told = []
    for method in (LR, AP, BF):
        one = level(scores, method, FT, 0.03)
        ahead = one.verdict == "does not hold" and f"{method} - {FT} = +" in one.because
        told.append(Judgement("holds", one.because) if ahead else one)
    return all_of([Judgement(one.verdict, f"With {fewest} examples: {one.because}") for one in told])


def closer_with_more(evidence: Evidence) -> Judgement:
    """Prompt tuning's score rises by more from the fewest examples to the most than full fine-tuning's."""
    examples = evidence.study.grid.get("train_rows", ())
    if len(examples) < 2:
        return Judgement("undecided", "It takes two numbers of examples.")
    few, many = (at(evidence, value).scores() for value in (min(examples), max(examples)))
    for scores in (few, many):
        if (missing := lacking(scores, (FT, PT))) is not None:
            return missing
    shared = [task for task in complete(few, (FT, PT)) if task in complete(many, (FT, PT))]
    gains = {task: {method: many[task][method] - few[task][method] for method in (FT, PT)} for task in shared}
    told = better(gains, PT, FT)
    return Judgement(told.verdict, f"Gains from {min(examples)} to {max(examples)} examples: {told.because}")


def closer_when_larger(evidence: Evidence, rungs: list[str]) -> Judgement:
    """What prompt tuning lacks to full fine-tuning is less on the largest model than on the smallest, with the most examples."""
    most = max(evidence.study.grid["train_rows"])
    side = {rung: units(evidence.narrowed(lambda record: record.cell.get("train_rows") == most), rung) for rung in (rungs[0], rungs[-1])}
    for scores in side.values():
        if (missing := lacking(scores, (FT, PT))) is not None:
            return missing
    small, large = ({unit: row[PT] - row[FT] for unit, row in complete(scores, (FT, PT)).items()} for scores in side.values())
    return better({unit: {"small": small[unit], "large": large[unit]} for unit in small if unit in large}, "large", "small")


def sections(evidence: Evidence) -> list[Section]:
    """Mean score by number of examples."""
    examples = [value for value in evidence.study.grid.get("train_rows", ()) if at(evidence, value).done]
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    rows = []
    for method in evidence.methods:
        cells = [method]
        for value in examples:
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
        "examples", draw_series(lines, evidence.methods, "training examples", "mean score"), "Mean score over tasks, with 95 % intervals."
    )
    return [Section("Score by number of examples", "", (Table(("method", *map(str, examples)), rows), picture))]


CLAIMS = (
    Claim("E29", "With few examples, LoRA, adapter and BitFit keep up with full fine-tuning (within 0.03).", keeps_up),
    Claim("E32", "Prompt tuning gains more from more examples than full fine-tuning does.", closer_with_more),
    Claim("E32", "Prompt tuning gains more from a larger model than full fine-tuning does.", on_ladder(closer_when_larger)),
)

experiments.register("low-data")(Experiment("low-data", "How do methods compare with only a few examples?", design, CLAIMS, sections))
