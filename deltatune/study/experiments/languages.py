"""Experiment 15, second part: a language learnt from plain text below, a task on top. Does it help in German, and can the language change?

Full: German similarity of sentences and German reading comprehension on SmolLM2-135M, which was trained on English: no multilingual
backbone is at hand. German is learnt from captions of photographs, 200 steps of 4, by an invertible adapter and one in each layer; English
captions of the same photographs are the control. Three seeds, seven ways and two baselines: 54 trials, about 11 core-hours. There are two
such tasks at hand, so that a task with a seed counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deltatune.methods import FullFineTuning, InvertibleAdapter, PfeifferAdapter
from deltatune.methods.kinds import Method
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import FT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import better
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, mean_of, over_tasks

SOURCES = {"stsb-de": "stsb", "xquad-de": "covid-qa"}
"""German task -> the English one of its kind. XQuAD's English half is left out: its splits are cut otherwise, so that it has texts of the
German test rows among its training rows."""

GERMAN, ENGLISH = ({"task": "multi30k-en-de", "column": column} for column in ("de", "en"))
LANGUAGE: tuple[Method, ...] = (InvertibleAdapter(), PfeifferAdapter())
TASK = PfeifferAdapter()

ALONE, ON_GERMAN, ON_ENGLISH = "task alone", "task on German", "task on English"
ZERO, KEPT, CHANGED = "English task alone", "English task on English", "English task, German put below"
STACKS: Mapping[str, Mapping[str, Any]] = {
    ALONE: {},
    ON_GERMAN: {"language": GERMAN},
    ON_ENGLISH: {"language": ENGLISH},
    ZERO: {"source": SOURCES},
    KEPT: {"language": ENGLISH, "source": SOURCES},
    CHANGED: {"language": ENGLISH, "then": GERMAN, "source": SOURCES},
}
"""Label -> what the procedure is told. The last three learn an English task, and are scored on the German one."""

WORDS = {"framing": "text2text"}
"""A language is learnt by the next token, so that the tasks on top have to be answered in words."""

SETTINGS = {
    "max_steps": 200, "batch_size": 4, "max_length": 320, "evaluations": 2, "eval_rows": 64, "test_rows": 200, "eval_batch_size": 16,
}  # fmt: skip


def design(profile: Profile) -> Study:
    """Every stack on both tasks, and full fine-tuning; quick: one task, three ways, a few steps."""
    full = profile == "full"
    base = basis(profile)
    labels = tuple(STACKS) if full else (ON_GERMAN, CHANGED)
    methods = [Entry(FT, (FullFineTuning(),))] if full else []
    for label in labels:
        told = dict(STACKS[label])
        below = LANGUAGE if {"language", "then"} & told.keys() else ()
        methods.append(Entry(label, (*below, TASK), procedure="stack", options=told))
    return replace(
        base,
        name=f"languages-{profile}",
        experiment="languages",
        backbones=(DECODER,),
        tasks=tuple(SOURCES) if full else ("stsb-de",),
        methods=tuple(methods),
        settings=WORDS | (SETTINGS if full else {**SETTINGS, "max_steps": 3, "evaluations": 1, "eval_rows": 16, "test_rows": 32}),
        seeds=(0, 1, 2) if full else (0,),
    )


def by_pair(evidence: Evidence) -> Scores:
    """Task and seed -> method -> score."""
    table: Scores = {}
    for record in evidence.done:
        table.setdefault(f"{record.task}, seed {record.seed}", {})[record.method] = record.score or 0.0
    return table


def _than(first: str, second: str) -> Callable[[Evidence], Judgement]:
    def judge(evidence: Evidence) -> Judgement:
        told = better(by_pair(evidence), first, second)
        return Judgement(told.verdict, f"A task with a seed counts as one. {told.because}")

    return judge


def perplexities(evidence: Evidence) -> dict[str, tuple[float, float]]:
    """Texts -> mean perplexity before they were learnt, and after."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for record in evidence.done:
        for name, told in record.numbers.get("languages", {}).items():
            found.setdefault(name, []).append(told)
    return {
        name: (mean_of([one["before"] for one in own]).value, mean_of([one["after"] for one in own]).value) for name, own in found.items()
    }


def sections(evidence: Evidence) -> list[Section]:
    """What was learnt of each language, the ways in one picture, and both tasks."""
    pairs = by_pair(evidence)
    methods = [method for method in evidence.methods if any(method in row for row in pairs.values())]
    shared = complete(pairs, methods)
    if not shared:
        return []
    cells = grouped(evidence.done, lambda record: (record.task, record.method))
    tasks = list(dict.fromkeys(task for task, _ in cells))
    rows = []
    for method in methods:
        means = [mean_of([record.score or 0.0 for record in cells[task, method]]) if (task, method) in cells else "-" for task in tasks]
        rows.append((method, f"{over_tasks(shared, method).value:.3f}", *map(str, means)))
    note = (
        "Mean and standard deviation over seeds on German test rows. `on German`, `on English`: the language that lay below, frozen, while "
        "the task was learnt. `English task`: learnt in English."
    )
    picture = Picture(
        "stacks", draw_method_scores(method_scores(shared, methods), methods), "Mean over tasks and seeds; each grey stroke is one of them."
    )
    found = [Section("German tasks", "", (Table(("way", "mean", *tasks), rows, note=note), picture))]
    learnt = [(name, f"{before:.1f}", f"{after:.1f}") for name, (before, after) in perplexities(evidence).items()]
    if learnt:
        found.append(Section("What was learnt of the languages", "", (Table(("texts", "perplexity before", "after"), learnt),)))
    return found


CLAIMS = (
    Claim(
        "F4",
        "A German language adapter below makes a German task's adapter better, here on an English backbone: none is multilingual.",
        _than(ON_GERMAN, ALONE),
    ),
    Claim("F4", "It is the language that helps: English texts of the same content below help less.", _than(ON_GERMAN, ON_ENGLISH)),
    Claim("F4", "A task learnt in English is better in German when the language below it is changed.", _than(CHANGED, KEPT)),
)

experiments.register("languages")(
    Experiment("languages", "A language below, a task on top: does it help, and can the language change?", design, CLAIMS, sections)
)
