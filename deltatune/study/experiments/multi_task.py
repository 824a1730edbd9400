"""Experiment 15, first part: several tasks at once. Is one delta for all of them as good as one for each, and what does a fusion add?

Full: eight tasks of six kinds by label words on SmolLM2-135M, each with 120 rows and 100 steps of 8 of them: LoRA and the Pfeiffer adapter
shared by all tasks and one for each, full fine-tuning on all, and a fusion of the adapters, which has 50 of the steps for the adapters and
50 for itself: 6 trials of 800 steps and two baselines, about 5 core-hours.
"""

from __future__ import annotations

from dataclasses import replace

from deltatune.methods import FullFineTuning, LoRA, PfeifferAdapter
from deltatune.methods.kinds import Method
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, FT, LR, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.forgetting import RING
from deltatune.study.experiments.forgetting import SETTINGS as SAME
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import all_of, better, reaches
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.procedures.several import parts_of
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, mean_of, over_tasks
from deltatune.tasks import get_task

TASKS = (*RING, "glue-mrpc", "tweet-sentiment")
STEPS = 100
"""Of each task, whichever way it is trained."""

SHARED, OWN, FUSED = ", shared", ", one a task", ", fused"
"""Behind the name of a method."""

ALIKE = 1000.0
"""A temperature at which every task gives as many rows."""


def design(profile: Profile) -> Study:
    """One mixture, trained in three ways; quick: two tasks, a few steps."""
    full = profile == "full"
    base, tasks = basis(profile), TASKS if full else TASKS[:2]
    recipes: dict[str, Method] = {FT: FullFineTuning(), LR: LoRA(), AP: PfeifferAdapter()}
    steps = STEPS if full else 4
    everyone = {"max_steps": steps * len(tasks), "temperature": ALIKE}
    methods = [
        Entry(label + SHARED, (one,), settings=everyone, procedure="several", options={"deltas": "shared"})
        for label, one in recipes.items()
    ]
    methods += [Entry(label + OWN, (recipes[label],), procedure="several", options={"deltas": "own"}) for label in (LR, AP)]
    halved = {"max_steps": steps // 2}
    methods.append(Entry(AP + FUSED, (recipes[AP],), settings=halved, procedure="several", options={"deltas": "fused"}))
    settings = (
        {**SAME, "max_steps": steps} if full else {**base.settings, "max_steps": steps, "evaluations": 1, "eval_rows": 16, "test_rows": 32}
    )
    return replace(
        base,
        name=f"multi-task-{profile}",
        experiment="multi-task",
        backbones=(DECODER,),
        tasks=(",".join(tasks),),
        methods=tuple(methods),
        settings=settings,
    )


def by_task(evidence: Evidence) -> Scores:
    """Task of the mixture -> method -> mean over seeds of the task's customary metric."""
    table: Scores = {}
    for (mixture, method), own in grouped(evidence.done, lambda record: (record.task, record.method)).items():
        for task in parts_of(mixture):
            name = f"{task}.{get_task(task).metric}"
            values = [record.numbers["metrics"][name] for record in own if name in record.numbers.get("metrics", {})]
            if values:
                table.setdefault(task, {})[method] = mean_of(values).value
    return table


def shared_is_enough(evidence: Evidence) -> Judgement:
    """One delta for all reaches 97 % of one for each, LoRA's as the adapter's."""
    scores = by_task(evidence)
    return all_of([reaches(scores, label + SHARED, label + OWN, 0.97) for label in (LR, AP)])


def shared_keeps_up(evidence: Evidence) -> Judgement:
    """One delta for all reaches 95 % of full fine-tuning on all."""
    scores = by_task(evidence)
    return all_of([reaches(scores, label + SHARED, FT + SHARED, 0.95) for label in (LR, AP)])


def sections(evidence: Evidence) -> list[Section]:
    """Means, what is trained and kept for them, and every task."""
    scores = by_task(evidence)
    methods = [method for method in evidence.methods if any(method in row for row in scores.values())]
    shared = complete(scores, methods)
    if not shared:
        return []
    rows = []
    for method in methods:
        mean, own = over_tasks(shared, method), [record for record in evidence.done if record.method == method]
        share = mean_of([record.share or 0.0 for record in own]).value
        size = mean_of([record.delta_bytes or 0 for record in own]).value
        rows.append((method, f"{mean.value:.3f}", f"{mean.low:.3f} to {mean.high:.3f}", f"{100 * share:.3g}", f"{size / 1e6:.1f}"))
    columns = ("method", "mean over tasks", "95 % interval", "trained %", "megabytes")
    note = (
        f"Over {len(shared)} tasks, with equally many steps in every way of training. Trained and megabytes are of all deltas that "
        "the tasks need together. The baselines are scored on a sample of the rows of all tasks."
    )
    picture = Picture(
        "together", draw_method_scores(method_scores(shared, methods), methods), "Mean over tasks; each grey stroke is a task."
    )
    every = [(task, get_task(task).metric, *(f"{row[method]:.3f}" for method in methods)) for task, row in sorted(shared.items())]
    return [
        Section("Together and apart", "", (Table(columns, rows, note=note), picture)),
        Section("Every task", "", (Table(("task", "metric", *methods), every, left=2),)),
    ]


CLAIMS = (
    Claim("F3", "One delta shared by all tasks is about as good as one for each (at least 97 %).", shared_is_enough),
    Claim("F3", "It keeps up with full fine-tuning on all tasks (at least 95 %).", shared_keeps_up),
    Claim(
        "F3",
        "A fusion of all tasks' adapters is better than each task's own adapter trained for as many steps.",
        lambda evidence: better(by_task(evidence), AP + FUSED, AP + OWN),
    ),
)

experiments.register("multi-task")(
    Experiment("multi-task", "Is one delta for several tasks as good as one for each?", design, CLAIMS, sections)
)
