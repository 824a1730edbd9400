"""Experiment 12, second part: trained to the same score, whose open generations stay as varied as the backbone's?

Full: six tasks by label words on SmolLM2-135M; full fine-tuning, LoRA, adapter and BitFit for 15, 30 and 60 steps of 8 rows, so that
each delta can be held against a fine-tuned model of the same score; 64 texts of 40 tokens from openings of news: 72 trainings, about 6
core-hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from deltatune.methods import Adapter, BitFit, Frozen, FullFineTuning, LoRA
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.forgetting import ON, RING
from deltatune.study.experiments.forgetting import SETTINGS as SAME
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import better
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.record import Record
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, mean_of

FROZEN = "frozen"
MEASURES = ("distinct-1", "distinct-2", "self-bleu")
EQUAL = 0.03
"""Scores that are not further apart are equal."""

STEPS = (15, 30, 60)


@dataclass(frozen=True)
class Pair:
    """A delta and a fine-tuned model of the same score on one task.

    Attributes:
        task: of both.
        delta: the one's record.
        full: the other's.
    """

    task: str
    delta: Record
    full: Record


def design(profile: Profile) -> Study:
    """Each method for several numbers of steps, and the backbone as it is; quick: one task, two methods, a few steps."""
    full = profile == "full"
    base = basis(profile)
    recipes = {FT: FullFineTuning(), LR: LoRA(), AP: Adapter(), BF: BitFit()} if full else {FT: FullFineTuning(), LR: LoRA()}
    options = {"prompts": "bbc-news"} if full else {"prompts": "bbc-news", "rows": 8, "tokens": 8}
    methods = [Entry(label, (method,), procedure="write", options=options) for label, method in {**recipes, FROZEN: Frozen()}.items()]
    return replace(
        base,
        name=f"diversity-{profile}",
        experiment="diversity",
        backbones=(DECODER,),
        tasks=RING if full else RING[:1],
        methods=tuple(methods),
        settings=SAME if full else {**base.settings, "evaluations": 1, "eval_rows": 16, "test_rows": 32},
        grid={"max_steps": STEPS if full else (2, 4)},
    )


def pairs(evidence: Evidence) -> list[Pair]:
    """For each task and delta the best two of equal score, at least halfway from the backbone's score to the best fine-tuned one."""
    done = [record for record in evidence.done if "written" in record.numbers]
    found = []
    for task in dict.fromkeys(record.task for record in done):
        own = [record for record in done if record.task == task]
        tuned, bare = _of(own, FT), _of(own, FROZEN)
        if not tuned or not bare:
            continue
        least = (max(map(_score, tuned)) + max(map(_score, bare))) / 2
        for method in ON:
            equal = [
                Pair(task, one, other) for one in _of(own, method) for other in tuned if abs(_score(one) - _score(other)) <= EQUAL + 1e-9
            ]
            taught = [pair for pair in equal if min(_score(pair.delta), _score(pair.full)) >= least]
            if taught:
                found.append(max(taught, key=lambda pair: min(_score(pair.delta), _score(pair.full))))
    return found


def _of(records: Iterable[Record], method: str) -> list[Record]:
    return [record for record in records if record.method == method]


def _score(record: Record) -> float:
    return record.score or 0.0


def against(evidence: Evidence, measure: str, *, from_backbone: bool = False) -> Scores:
    """Task -> ``deltas`` and full fine-tuning -> mean of the measure over the pairs; or its mean distance from the backbone's."""
    found: Scores = {}
    for task in dict.fromkeys(pair.task for pair in pairs(evidence)):
        own = [pair for pair in pairs(evidence) if pair.task == task]
        start = _mean(_of((record for record in evidence.done if record.task == task), FROZEN), measure) if from_backbone else None
        sides = {"deltas": [pair.delta for pair in own], FT: [pair.full for pair in own]}
        found[task] = {name: _mean(records, measure, start) for name, records in sides.items()}
    return found


def _mean(records: Sequence[Record], measure: str, start: float | None = None) -> float:
    values = [record.numbers["written"][measure] for record in records]
    return fmean(values if start is None else [abs(value - start) for value in values])


def more_varied(evidence: Evidence) -> Judgement:
    """More different pairs of tokens."""
    return better(against(evidence, "distinct-2"), "deltas", FT)


def less_alike(evidence: Evidence) -> Judgement:
    """The texts of a fine-tuned model are more like each other."""
    return better(against(evidence, "self-bleu"), FT, "deltas")


def nearer(evidence: Evidence) -> Judgement:
    """A fine-tuned model is further from what the backbone has of different pairs of tokens."""
    return better(against(evidence, "distinct-2", from_backbone=True), FT, "deltas")


def sections(evidence: Evidence) -> list[Section]:
    """Each delta beside the fine-tuned models of equal score, and the backbone; then some texts."""
    found = pairs(evidence)
    if not found:
        return []
    tasks = {pair.task for pair in found}
    bare = [record for record in _of(evidence.done, FROZEN) if record.task in tasks]
    rows = [_row(FROZEN, bare, len(tasks))]
    table: Scores = {}
    for method in ON:
        own = [pair for pair in found if pair.delta.method == method]
        if own:
            rows.append(_row(method, [pair.delta for pair in own], len(own)))
            rows.append(_row(f"{FT}, as good as {method}", [pair.full for pair in own], len(own)))
    for pair in found:
        table.setdefault(pair.task, {})[pair.delta.method] = pair.delta.numbers["written"]["distinct-2"]
    for task, row in against(evidence, "distinct-2").items():
        table[task] |= {FT: row[FT], FROZEN: _mean([record for record in bare if record.task == task], "distinct-2")}
    methods = [method for method in evidence.methods if any(method in row for row in table.values())]
    note = f"Means over the tasks on which both have scores within {EQUAL} of each other, each the best such pair."
    picture = Picture(
        "distinct", draw_method_scores(method_scores(table, methods), methods, "distinct-2"), "Mean over tasks; each grey stroke is a task."
    )
    shown = [(pair.delta.method, pair.task, text) for pair in found[:4] for text in pair.delta.numbers["written"].get("shown", [])[:1]]
    texts = Table(("method", "trained on", "goes on writing"), shown, left=3)
    return [
        Section("At equal score", "", (Table(("method", "score", *MEASURES, "tasks"), rows, note=note), picture)),
        *([Section("Some texts", "", (texts,))] if shown else []),
    ]


def _row(name: str, records: Sequence[Record], tasks: int) -> tuple[str, ...]:
    means = [mean_of([record.numbers["written"][measure] for record in records]) for measure in MEASURES]
    return (name, f"{fmean(map(_score, records)):.3f}", *map(str, means), str(tasks))


CLAIMS = (
    Claim("F5", "At equal score, a delta leaves open generations more varied than full fine-tuning (distinct-2).", more_varied),
    Claim("F5", "At equal score, a delta's open generations are less like each other (self-BLEU).", less_alike),
    Claim("F5", "At equal score, a delta's open generations are nearer to the backbone's (distinct-2).", nearer),
)

experiments.register("diversity")(
    Experiment("diversity", "Trained to the same score, whose open generations stay varied?", design, CLAIMS, sections)
)
