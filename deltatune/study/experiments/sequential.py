"""Experiment 5: adapter, BitFit and prompt trained one behind the other, earlier ones active but frozen; does a further stage still help?

Full: SST-2 on SmolLM2-135M by label words, with the template and without, all six orders, five seeds, 30 steps of 8 rows a stage: 60
trials of three stages, about five core-hours. The paper has RoBERTa-large, 6,000 steps a stage and one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from statistics import fmean

from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import basis
from deltatune.study.experiments.combination import PARTS
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.generalization import BARE, DECODER
from deltatune.study.experiments.judging import FEWEST, p_of
from deltatune.study.plots.series import draw_series
from deltatune.study.record import Record
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Mean, Scores, complete, mean_of, paired

ORDERS = tuple(" > ".join(order) for order in permutations(PARTS))
"""``AP > BF > PT`` and so on."""

TASK = "glue-sst2"
SETTINGS = {"max_steps": 30, "batch_size": 8, "max_length": 64, "train_rows": 64, "evaluations": 2, "eval_rows": 64, "test_rows": 200}
WORTH = 0.005
"""Less is no improvement, and orders that are not further apart are level."""


def design(profile: Profile) -> Study:
    """Every order with the template and without; quick: two orders, a few steps."""
    full = profile == "full"
    base = basis(profile)
    orders = ORDERS if full else ORDERS[:2]
    with_ = [Entry(order, tuple(PARTS[part] for part in order.split(" > ")), procedure="stages") for order in orders]
    bare = [replace(one, label=one.label + BARE, settings={"manual_template": False}) for one in with_]
    return replace(
        base,
        name=f"sequential-{profile}",
        experiment="sequential",
        backbones=(DECODER,),
        tasks=(TASK,),
        methods=(*with_, *bare),
        settings=SETTINGS if full else {**base.settings, "max_steps": 3, "evaluations": 1, "eval_rows": 16, "test_rows": 32},
        seeds=tuple(range(5)) if full else (0,),
    )


def staged(evidence: Evidence) -> Iterator[tuple[str, str, str, Record]]:
    """(a name for the trial, its order, ``with`` or ``without`` the template, its record) of each that has stages."""
    for record in evidence.done:
        order = record.method.removesuffix(BARE)
        if order in ORDERS and record.numbers.get("stages"):
            half = "without" if record.method.endswith(BARE) else "with"
            yield f"{record.task}, {half} template, seed {record.seed}", order, half, record


def additions(evidence: Evidence) -> dict[str, Scores]:
    """Part -> trial and stage -> score ``before`` the part was put behind others, and ``after``."""
    found: dict[str, Scores] = {part: {} for part in PARTS}
    for name, order, _, record in staged(evidence):
        scores = [stage["score"] for stage in record.numbers["stages"]]
        for number, part in enumerate(order.split(" > ")):
            if number:
                found[part][f"{name}, {order}, stage {number + 1}"] = {"before": scores[number - 1], "after": scores[number]}
    return found


def keeps_improving(evidence: Evidence) -> Judgement:
    """Some part, put behind others, raises the score; of none of them is it known that it does not."""
    told = [(part, scores) for part, scores in additions(evidence).items() if len(scores) >= FEWEST]
    if not told:
        return Judgement("undecided", f"No part was put behind others in {FEWEST} trials or more.")
    named: Scores = {}
    for part, own in told:
        named |= {f"{part}: {stage}": {f"{part} {when}": score for when, score in row.items()} for stage, row in own.items()}
    pairs = paired(named, [(f"{part} after", f"{part} before") for part, _ in told])
    said = "; ".join(
        f"{part} adds {one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f}, p = {p_of(one)}, {one.tasks} stages)"
        for (part, _), one in zip(told, pairs, strict=True)
    )
    if any(one.is_significant and one.difference > 0 for one in pairs):
        return Judgement("holds", f"{said}.")
    never = len(told) == len(PARTS) and all(one.high < WORTH for one in pairs)
    return Judgement("does not hold" if never else "undecided", f"{said}.")


def last_scores(evidence: Evidence) -> Scores:
    """Half and seed -> order -> score behind the last stage."""
    found: Scores = {}
    for name, order, _, record in staged(evidence):
        found.setdefault(name, {})[order] = record.numbers["stages"][-1]["score"]
    return found


def no_order_is_best(evidence: Evidence) -> Judgement:
    """One order that is better than each other decides against it; one that is level with the best decides for it."""
    scores = complete(last_scores(evidence), ORDERS)
    if len(scores) < FEWEST:
        return Judgement("undecided", f"Only {len(scores)} seeds and templates have scores of all orders; {FEWEST} are needed.")
    means = {order: fmean(row[order] for row in scores.values()) for order in ORDERS}
    best = max(means, key=means.__getitem__)
    pairs = paired(scores, [(best, other) for other in ORDERS if other != best])
    first = {order: sum(row[order] == max(row.values()) for row in scores.values()) for order in ORDERS}
    closest = min(pairs, key=lambda one: one.difference)
    said = (
        f"Over {len(scores)} seeds and templates {best} has the best mean, {means[best]:.4f}, and is first {first[best]} times; "
        f"{closest.other} is {closest.difference:.4f} ({closest.low:+.4f} to {closest.high:+.4f}) behind."
    )
    if all(one.is_significant for one in pairs):
        return Judgement("does not hold", said)
    return Judgement("holds" if any(one.high <= WORTH for one in pairs) else "undecided", said)


def sections(evidence: Evidence) -> list[Section]:
    """The paper's table: each order by stage, with the template and without; and what each part adds."""
    rows, lines = [], {}
    for order in ORDERS:
        row: list[str] = [order]
        for half in ("without", "with"):
            own = [record.numbers["stages"] for _, one, which, record in staged(evidence) if (one, which) == (order, half)]
            means = [mean_of([stages[number]["score"] for stages in own]) for number in range(len(own[0]))] if own else []
            row.append(" > ".join(map(str, means)) or "-")
            if means and half == "with":
                lines[order] = [(number, mean.value, mean.low, mean.high) for number, mean in enumerate(means, 1)]
        rows.append(row)
    if all(cell == "-" for row in rows for cell in row[1:]):
        return []
    table = Table(("order", "without template", "with template"), rows, note="Test scores behind each stage; mean and standard deviation.")
    pictures = []
    if lines:
        figure = draw_series(lines, ORDERS, "stage", "test score", logarithmic=False)
        pictures.append(Picture("stages", figure, "Mean score behind each stage with the template, with 95 % intervals over seeds."))
    return [Section("Scores by stage", "", (table, *pictures)), *_added(evidence)]


def _added(evidence: Evidence) -> Iterator[Section]:
    changes = {part: [row["after"] - row["before"] for row in own.values()] for part, own in additions(evidence).items()}
    rows = [(part, *_row(mean_of(own))) for part, own in changes.items() if own]
    if rows:
        note = "Score behind the stage in which the part was trained, less that before it, wherever others had been trained ahead of it."
        yield Section("What each part adds behind others", "", (Table(("part", "adds", "95 % interval", "stages"), rows, note=note),))


def _row(mean: Mean) -> Sequence[str]:
    return f"{mean.value:+.4f}", f"{mean.low:+.4f} to {mean.high:+.4f}", str(mean.count)


CLAIMS = (
    Claim("E13", "A delta that is trained behind others sometimes improves on them.", keeps_improving),
    Claim("E13", "No order is always best.", no_order_is_best),
)

experiments.register("sequential")(
    Experiment("sequential", "Deltas one behind the other: does a further stage still help, and in which order?", design, CLAIMS, sections)
)
