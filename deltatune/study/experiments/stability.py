"""Experiment 14: how much does each method's score hang on the seed, and what does a long prefix cost?

Full: eight tasks on MiniLM with a head, 32 examples of each class, five seeds: full fine-tuning, four deltas and a prefix of 100 tokens in
place of 20; full fine-tuning and LoRA on random weights of the same shape too: 480 trials with the
baselines, about three core-hours.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median, stdev

from deltatune.methods import PrefixTuning
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, SHORT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import better, lacking
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, over_tasks, scores_of

DELTAS = (LR, AP, PF, BF)
RANDOM, FROZEN = "minilm@random", "frozen"
LONG = "prefix-tuning-100"

SETTINGS = {"shots": 32, "max_length": 64, "batch_size": 8, "max_steps": 200, "evaluations": 10, "early_stopping": 4, "test_rows": 300}


PATIENT = {"max_steps": 400, "evaluations": 20, "early_stopping": 8}


def design(profile: Profile) -> Study:
    """Experiment 1 on fewer tasks with more seeds, and few examples of each class, where seeds matter most."""
    full, base = profile == "full", basis(profile)
    chosen = [entry for entry in base.methods if entry.label in (FT, *DELTAS)]
    methods = [replace(entry, settings=PATIENT if full and entry.label == PF else {}) for entry in chosen]
    methods = [entry if entry.label in (FT, LR) else replace(entry, backbones=base.backbones) for entry in methods]
    longer = Entry(LONG, (PrefixTuning(num_virtual_tokens=100),), settings=PATIENT, backbones=base.backbones)
    return replace(
        base,
        name=f"stability-{profile}",
        experiment="stability",
        backbones=(*base.backbones, RANDOM) if full else base.backbones,
        tasks=SHORT if full else base.tasks,
        methods=(*methods, longer) if full else tuple(methods),
        settings=SETTINGS if full else base.settings,
        seeds=tuple(range(5)) if full else (0, 1),
    )


def deviations(evidence: Evidence, backbone: str | None = None) -> Scores:
    """Task -> method -> standard deviation of the score over seeds, of those that have several, on one backbone.

    What has learnt nothing is left out, since nothing is steadier: a method whose mean is not above the frozen backbone's, or that gave
    every row the same answer with some seed.
    """
    found: Scores = {}
    own = [record for record in evidence.done if record.backbone == (backbone or evidence.study.backbones[0])]
    bare = scores_of(record for record in own if record.method == FROZEN)
    for (task, method), records in grouped(own, lambda record: (record.task, record.method)).items():
        scores = [record.score for record in records if record.score is not None]
        learnt = not any(record.degenerate for record in records) and fmean(scores) > bare.get(task, {}).get(FROZEN, -1.0)
        if len(scores) > 1 and learnt:
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


def steadier_start(evidence: Evidence) -> Judgement:
    """LoRA on the pretrained backbone deviates less than on random weights, where it learns on both."""
    sides = {"pretrained": deviations(evidence), "random": deviations(evidence, RANDOM)}
    if not sides["random"]:
        return Judgement("undecided", f"No scores of {LR} on {RANDOM} with several seeds.")
    shared = [task for task in sides["pretrained"] if all(LR in side.get(task, {}) for side in sides.values())]
    table = {task: {f"{name}, negated": -side[task][LR] for name, side in sides.items()} for task in shared}
    if (missing := lacking(table, ("pretrained, negated", "random, negated"))) is not None:
        return missing
    told = better(table, "pretrained, negated", "random, negated")
    said = ", ".join(f"{name} {fmean(side[task][LR] for task in shared):.4f}" for name, side in sides.items())
    return Judgement(told.verdict, f"Mean deviation of {LR} over seeds: {said}. {told.because}")


def length_costs(evidence: Evidence) -> Judgement:
    """A step with 100 prefix tokens takes longer than one with 20."""
    times: Scores = {}
    timed = [record for record in evidence.done if record.method in (PF, LONG) and record.seconds_per_step]
    for (task, method), own in grouped(timed, lambda record: (record.task, record.method)).items():
        times.setdefault(task, {})[method] = median(record.seconds_per_step or 0.0 for record in own)
    if (missing := lacking(times, (PF, LONG))) is not None:
        return missing
    shared = complete(times, (PF, LONG))
    ratio = fmean(row[LONG] / row[PF] for row in shared.values())
    said = f"A step with 100 tokens takes {ratio:.2f} of one with 20, over {len(shared)} tasks (medians over seeds)."
    return Judgement(better(shared, LONG, PF).verdict, said)


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


CLAIMS = (
    Claim("E33", "Training a delta is steadier over seeds than training everything.", steadier),
    Claim("E33", "Training a delta is steadier from a good start: pretrained weights against random ones.", steadier_start),
    Claim("B20", "A prefix uses up length: a longer one makes every step slower.", length_costs),
)

experiments.register("stability")(Experiment("stability", "How much does a score hang on the seed?", design, CLAIMS, sections))
