"""Experiment 12, first part: trained on one task after another, what does each method still know of the earlier ones?

Full: six tasks by label words on SmolLM2-135M, in the six orders of their ring; full fine-tuning, LoRA, adapter and BitFit trained on and
on, and a LoRA of its own for each task; 30 steps of 8 rows a task: 30 streams, about five core-hours.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from deltatune.methods import Adapter, BitFit, FullFineTuning, LoRA
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import FEWEST, all_of, better
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.record import Record
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Mean, Scores, complete, grouped, mean_of, over_tasks

RING = ("glue-sst2", "ag-news", "sms-spam", "trec-coarse", "subj", "emotion")
"""Tasks that some steps teach, of several kinds, all scored by accuracy."""

SETTINGS = {"max_steps": 30, "batch_size": 8, "max_length": 64, "train_rows": 120, "evaluations": 1, "eval_rows": 32, "test_rows": 100}
OWN = "lora, one a task"
ON = (LR, AP, BF)
"""Deltas that train on."""


def design(profile: Profile) -> Study:
    """Each order once, by its first task; quick: three tasks, three methods, a few steps."""
    full = profile == "full"
    base = basis(profile)
    recipes = {FT: FullFineTuning(), LR: LoRA(), AP: Adapter(), BF: BitFit()} if full else {FT: FullFineTuning(), LR: LoRA()}
    options = {"tasks": list(RING if full else RING[:3])}
    methods = [Entry(label, (method,), procedure="stream", options=options) for label, method in recipes.items()]
    methods.append(Entry(OWN, (LoRA(),), procedure="stream", options={**options, "deltas": "own"}))
    return replace(
        base,
        name=f"forgetting-{profile}",
        experiment="forgetting",
        backbones=(DECODER,),
        tasks=RING if full else RING[:1],
        methods=tuple(methods),
        settings=SETTINGS if full else {**base.settings, "max_steps": 3, "evaluations": 1, "eval_rows": 16, "test_rows": 32},
    )


def streamed(evidence: Evidence) -> list[Record]:
    """The trials that were streams of several tasks."""
    return [record for record in evidence.done if record.numbers.get("forgetting") is not None]


def lost(evidence: Evidence) -> Scores:
    """Order (by its first task) -> method -> forgetting, mean over seeds."""
    table: Scores = {}
    for (task, method), own in grouped(streamed(evidence), lambda record: (record.task, record.method)).items():
        table.setdefault(task, {})[method] = fmean(record.numbers["forgetting"] for record in own)
    return table


def kept(evidence: Evidence) -> Scores:
    """Order -> method -> mean score over all tasks behind the last one."""
    return evidence.narrowed(lambda record: record.numbers.get("forgetting") is not None).scores()


def forgets_less(evidence: Evidence) -> Judgement:
    """Each delta that trains on forgets less than full fine-tuning."""
    scores = lost(evidence)
    there = [method for method in ON if any(method in row for row in scores.values())]
    return all_of([better(scores, FT, method) for method in there]) if there else Judgement("undecided", "No delta was trained on.")


def own_forget_nothing(evidence: Evidence) -> Judgement:
    """Not a point is lost where each task has a delta of its own, and no stream of any method left a trace on the backbone."""
    records = streamed(evidence)
    own = [record for record in records if record.method == OWN]
    if len(own) < FEWEST:
        return Judgement("undecided", f"Only {len(own)} streams with a delta a task; {FEWEST} are needed.")
    worst = max(record.numbers["forgetting"] for record in own)
    changed = [record for record in records if not record.numbers["backbone"]["restored"]]
    said = (
        f"The most that one of {len(own)} streams with a delta a task forgot is {worst:.4f}; behind {len(changed)} of all {len(records)} "
        "streams the hash of the backbone had changed."
    )
    return Judgement("does not hold" if changed or worst > 0 else "holds", said)


def sections(evidence: Evidence) -> list[Section]:
    """What is forgotten and what is left, then the matrices of one order."""
    scores, left, records = lost(evidence), kept(evidence), streamed(evidence)
    methods = [method for method in evidence.methods if any(method in row for row in scores.values())]
    if not methods:
        return []
    rows = []
    for method in methods:
        gone, still = (over_tasks(complete(table, [method]), method) for table in (scores, left))
        same = [record.numbers["backbone"]["restored"] for record in records if record.method == method]
        rows.append((method, *_range(gone), *_range(still), f"{sum(same)} of {len(same)}"))
    columns = ("method", "forgotten", "95 % interval", "left at the end", "95 % interval", "backbone restored")
    note = (
        "Forgotten: the best score a task had, less that at the end, mean over all tasks but the last. Left: mean over all tasks. "
        "Intervals are over orders. Restored: streams behind which the hash of every tensor of the backbone was what it had been."
    )
    picture = Picture(
        "forgotten",
        draw_method_scores(method_scores(scores, methods), methods, "forgotten"),
        "Mean over orders; each grey stroke is an order.",
    )
    return [Section("What is forgotten", "", (Table(columns, rows, note=note), picture)), *_matrices(records, methods)]


def _range(mean: Mean) -> tuple[str, str]:
    return f"{mean.value:.3f}", f"{mean.low:.3f} to {mean.high:.3f}"


def _matrices(records: list[Record], methods: list[str]) -> list[Section]:
    """Scores on every task behind every task, of the first order; mean over seeds."""
    order = records[0].task
    tables = []
    for method in methods:
        own = [record for record in records if (record.task, record.method) == (order, method)]
        if not own:
            continue
        names = [stage["task"] for stage in own[0].numbers["stages"]]
        rows = [
            (
                name,
                *(
                    f"{mean_of([record.numbers['matrix'][row][column] for record in own])}" if column <= row else ""
                    for column in range(len(names))
                ),
            )
            for row, name in enumerate(names)
        ]
        tables.append(Table((f"{method}, behind", *names), rows))
    return [Section(f"Scores in the course of the order that begins with {order}", "", tuple(tables))]


CLAIMS = (
    Claim("F5", "One delta that trains on and on forgets less than full fine-tuning.", forgets_less),
    Claim("F5", "With a delta for each task nothing is forgotten, and the backbone stays bit for bit what it was.", own_forget_nothing),
    Claim(
        "F5",
        "At the end a delta for each task has better scores than one model that is fine-tuned on.",
        lambda evidence: better(kept(evidence), OWN, FT),
    ),
)

experiments.register("forgetting")(
    Experiment("forgetting", "One task after another: what is still known of the earlier ones?", design, CLAIMS, sections)
)
