"""Experiment 14: how much does each method's score hang on the seed?"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import better, lacking
from deltatune.study.experiments.low_data import TASKS
from deltatune.study.experiments.performance import AP, BF, FT, LR, PF
from deltatune.study.experiments.performance import design as performance
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, grouped, over_tasks

DELTAS = (LR, AP, PF, BF)


def design(profile: Profile) -> Study:
    """Experiment 1 on fewer tasks with ten seeds, and 64 examples of each class, where seeds matter most."""
    base = performance(profile)
    methods = tuple(replace(entry, settings={}) for entry in base.methods if entry.label in (FT, *DELTAS))
    settings = {"max_steps": 600, "evaluations": 12, "early_stopping": 6, "max_length": 64, "shots": 64}
    return replace(
        base,
        name=f"stability-{profile}",
        experiment="stability",
        tasks=TASKS if profile == "full" else base.tasks,
        methods=methods,
        settings=settings if profile == "full" else base.settings,
        seeds=tuple(range(10)) if profile == "full" else (0, 1),
    )


def deviations(evidence: Evidence) -> Scores:
    """Task -> method -> standard deviation of the score over seeds, of those that have several."""
    found: Scores = {}
    for (task, method), records in grouped(evidence.done, lambda record: (record.task, record.method)).items():
        scores = [record.score for record in records if record.score is not None]
        if len(scores) > 1:
            found.setdefault(task, {})[method] = stdev(scores)
    return found


def steadier(evidence: Evidence) -> Judgement:
    """The mean deviation of the deltas is smaller than full fine-tuning's."""
    scores = deviations(evidence)
    own = [method for method in DELTAS if method in evidence.methods]
    if (missing := lacking(scores, (FT, *own))) is not None or not own:
        return missing or Judgement("undecided", "No deltas have scores with several seeds.")
    shared = {task: row for task, row in scores.items() if all(method in row for method in (FT, *own))}
    table = {task: {"full, negated": -row[FT], "deltas, negated": -fmean(row[method] for method in own)} for task, row in shared.items()}
    told = better(table, "deltas, negated", "full, negated")
    said = ", ".join(f"{method} {over_tasks(shared, method).value:.4f}" for method in (FT, *own))
    return Judgement(told.verdict, f"Mean deviation over seeds: {said}. {told.because}")


def sections(evidence: Evidence) -> list[Section]:
    """The deviations by method and by task."""
    scores, methods = deviations(evidence), [method for method in evidence.methods if method in (FT, *DELTAS)]
    if not scores:
        return []
    rows = [(task, *(f"{row[method]:.4f}" if method in row else "-" for method in methods)) for task, row in sorted(scores.items())]
    found = method_scores(scores, methods)
    picture = Picture(
        "deviations",
        draw_method_scores(found, methods, "standard deviation over seeds"),
        "Mean deviation over tasks; each stroke is a task.",
    )
    return [Section("Deviation over seeds", "", (picture, Table(("task", *methods), rows)))]


CLAIMS = (Claim("E33", "Training a delta is steadier over seeds than training everything.", steadier),)

experiments.register("stability")(Experiment("stability", "How much does a score hang on the seed?", design, CLAIMS, sections))
