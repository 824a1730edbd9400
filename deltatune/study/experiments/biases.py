"""Experiment 10: which biases move in training, which of them matter, and does any other small set do as well?

BitFit trains all biases and the head; beside it stand two kinds of biases alone, BitFit with one kind left out, and random subsets of
entries and of rows of the layers' parameters, as many as there are biases. ``full`` has 13 methods on eight tasks, 120 trials of MiniLM
with the baselines and about one core-hour; ``quick`` a few minutes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from deltatune.methods import BitFit, LinearProbe, PartialBitFit, RandomSubset
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import BF, PROBE, SHORT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better, lacking, ratio_of, reaches
from deltatune.study.plots.layers import draw_layers, layers_of
from deltatune.study.report.comparison import comparison
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, over_tasks

QUERY, KEY, UP = "attention.query", "attention.key", "feed_forward.up"
KINDS = (QUERY, KEY, "attention.value", "attention.output", UP, "feed_forward.down", "norm")
"""Of biases, by role."""

PAIR, ENTRIES, ROWS = "query-and-up", "random-entries", "random-rows"
DENSITY = 26_112 / 10_646_784
"""MiniLM's biases as a share of the parameters in its layers, from which the random subsets are drawn."""

RATE = 1e-3
"""BitFit's own, for all subsets, so that they differ in what trains alone."""


def without(kind: str) -> str:
    """Label of BitFit with one kind left as it is."""
    return f"without {kind}"


def design(profile: Profile) -> Study:
    """Full: all of them on the short tasks, as long as in experiment 1."""
    full, base = profile == "full", basis(profile)
    drawn = ("*", "!embedding", "!position?")
    entries = [
        Entry(BF, (BitFit(),), procedure="movement"),
        Entry(PAIR, (PartialBitFit(),), settings={"lr": RATE}),
        Entry("key-alone", (PartialBitFit(),), where=KEY, settings={"lr": RATE}),
        *(Entry(without(kind), (BitFit(),), where=("*", f"!{kind}")) for kind in (KINDS if full else (QUERY,))),
        Entry(ENTRIES, (RandomSubset(density=DENSITY),), where=drawn, settings={"lr": RATE}),
        Entry(ROWS, (RandomSubset(density=DENSITY, part="rows"),), where=drawn, settings={"lr": RATE}),
        Entry(PROBE, (LinearProbe(),)),
    ]
    return replace(
        base,
        name=f"biases-{profile}",
        experiment="biases",
        tasks=SHORT if full else base.tasks,
        methods=tuple(entries),
    )


def lines_of(evidence: Evidence) -> list[Mapping[str, Any]]:
    """Every line of every BitFit trial, with ``task``, and ``relative``: the change as a share of what was there."""
    return [
        {**line, "task": record.task, "relative": line["change"] / line["original"] if line["original"] else 0.0}
        for record in evidence.done
        if record.method == BF
        for line in record.numbers.get("movement", ())
    ]


def changes(evidence: Evidence) -> Scores:
    """Task -> kind -> mean change of a bias of this kind, over layers and seeds; all norms are one kind."""
    found: dict[str, dict[str, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines_of(evidence):
        kind = next((kind for kind in KINDS if line["kind"].split(" ")[0] == kind), None)
        if kind is not None and line["layer"] is not None:
            found[line["task"]][kind].append((line["change"], line["size"]))
    return {task: {kind: _weighted(values) for kind, values in row.items()} for task, row in found.items()}


def _weighted(values: list[tuple[float, int]]) -> float:
    return sum(value * size for value, size in values) / sum(size for _, size in values)


def query_and_up_move_most(evidence: Evidence) -> Judgement:
    """The lesser of the two moves more than the most of all others."""
    scores = changes(evidence)
    if (missing := lacking(scores, KINDS)) is not None:
        return missing
    others = [kind for kind in KINDS if kind not in (QUERY, UP)]
    table = {task: {"lesser": min(row[QUERY], row[UP]), "most": max(row[kind] for kind in others)} for task, row in scores.items()}
    told = better(table, "lesser", "most")
    means = sorted(((over_tasks(scores, kind).value, kind) for kind in KINDS), reverse=True)
    return Judgement(told.verdict, f"Mean change: {', '.join(f'{kind} {value:.2g}' for value, kind in means)}. {told.because}")


def the_key_hardly_moves(evidence: Evidence) -> Judgement:
    """Less than a quarter of the other kinds' mean."""
    scores = changes(evidence)
    if (missing := lacking(scores, KINDS)) is not None:
        return missing
    table = {task: {"key": row[KEY], "others": fmean(row[kind] for kind in KINDS if kind != KEY)} for task, row in scores.items()}
    ratio, low, high = ratio_of(table, "key", "others")
    said = f"The key's bias moves {ratio:.1%} as far as the others on average ({low:.1%} to {high:.1%})."
    return Judgement("holds" if high < 0.25 else "does not hold" if low > 0.25 else "undecided", said)


def the_key_is_inert(evidence: Evidence) -> Judgement:
    """With the key's biases put back, every test row is answered as before."""
    found = [
        record.numbers["undone"][KEY]["same"] for record in evidence.done if record.method == BF and KEY in record.numbers.get("undone", {})
    ]
    if not found:
        return Judgement("undecided", "No trial has put the key's biases back.")
    said = f"With the key's biases put back, {fmean(found):.2%} of the rows are answered as before, in the worst trial {min(found):.2%}."
    return Judgement("holds" if min(found) >= 0.995 else "does not hold", said)


def fixing_costs(evidence: Evidence) -> Judgement:
    """BitFit is better than with either of the two kinds left as it is."""
    return all_of([better(evidence.scores(), BF, without(kind)) for kind in (QUERY, UP)])


def random_is_worse(evidence: Evidence) -> Judgement:
    """BitFit is better than each random subset, and these reach 90 % of it."""
    scores = evidence.scores()
    return all_of([one for subset in (ENTRIES, ROWS) for one in (better(scores, BF, subset), reaches(scores, subset, BF, 0.9))])


def sections(evidence: Evidence) -> list[Section]:
    """How far the biases moved, what undoing costs, and the scores."""
    lines = lines_of(evidence)
    return [*([_moved(evidence, lines)] if lines else []), *comparison(evidence)]


def _moved(evidence: Evidence, lines: list[Mapping[str, Any]]) -> Section:
    undone: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in evidence.done:
        found = record.numbers.get("undone", {}) if record.method == BF else {}
        for kind, one in found.items():
            undone[kind].append((one["score"] - found["none"]["score"], one["same"]))
    rows = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        own = [line for line in lines if line["kind"] == kind]
        told = undone.get(kind, [])
        rows.append(
            (
                kind,
                *(f"{fmean(line[what] for line in own):.3g}" for what in ("change", "original", "relative", "norm")),
                f"{fmean(score for score, _ in told):+.3f}" if told else "-",
                f"{fmean(same for _, same in told):.1%}" if told else "-",
            )
        )
    columns = ("bias", "mean change", "mean before", "relative", "norm of change", "score if undone", "answers that stay")
    note = (
        "Means over layers, tasks and seeds of BitFit's trials. Change is mean |b - b_0| and before mean |b_0|; the last two columns say "
        "what becomes of the score, and how many test rows are answered as before, when this kind alone is put back to b_0."
    )
    pictures = tuple(
        Picture(f"movement-{what}", draw_layers(layers_of(lines, what)), caption)
        for what, caption in (("change", "Mean change by kind of bias and layer."), ("relative", "The same as a share of mean |b_0|."))
    )
    return Section("Which biases move", "", (Table(columns, rows, note=note), *pictures))


CLAIMS = (
    Claim("C1", "BitFit is better than a frozen backbone with a trained head.", lambda evidence: better(evidence.scores(), BF, PROBE)),
    Claim(
        "C2", "Query and FFN-intermediate biases alone reach 97 % of BitFit.", lambda evidence: reaches(evidence.scores(), PAIR, BF, 0.97)
    ),
    Claim("C2", "Fixing either of these two kinds costs.", fixing_costs),
    Claim("C3", "Query and FFN-intermediate biases move most.", query_and_up_move_most),
    Claim("C3", "The key's biases hardly move (a quarter of the others, or less).", the_key_hardly_moves),
    Claim("C3", "The key's biases are inert: softmax does not see them.", the_key_is_inert),
    Claim("C4", "Random subsets of the same size are worse than BitFit, and still reach 90 % of it.", random_is_worse),
)

experiments.register("biases")(Experiment("biases", "Which biases move, and which matter?", design, CLAIMS, sections))
