"""Sections that compare methods over tasks: the heart of experiment 1, and of any study that names no experiment."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from deltatune.backbones.catalogue import catalogued
from deltatune.backbones.variants import parted
from deltatune.study.plots.categories import categories_of, draw_categories
from deltatune.study.plots.ranks import draw_ranks
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.plots.shares import draw_shares, shares_of
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, mean_of, over_categories, over_tasks, paired, ranks

if TYPE_CHECKING:
    from deltatune.study.experiments.experiment import Evidence


FORMS = {
    "head": "All tables of this backbone are of the head form: a task head answers.",
    "text2text": "All tables of this backbone are of the text-to-text form: label words are scored, other answers are written.",
    "cloze": "All tables of this backbone are of the cloze form: a word is put for a mask.",
}


def comparison(evidence: Evidence) -> list[Section]:
    """Averages, ranks, pairs, categories, every task; of each backbone and each cell of the grid by itself."""
    found = []
    backbones = list(dict.fromkeys(record.backbone for record in evidence.done))
    for number, backbone in enumerate(backbones):
        scores = evidence.scores(backbone)
        name = f" of {backbone}" if len(backbones) > 1 else ""
        found += [
            _averages(evidence, backbone, scores, name, number),
            _ranking(evidence, scores, name, number),
            _by_category(evidence, scores, name, number),
            _by_task(evidence, backbone, scores, name),
        ]
    return [section for section in found if section.blocks]


def form_of(evidence: Evidence, backbone: str) -> str:
    """In which form a study puts its tasks to a backbone; nothing where the backbone would have to be looked at to know."""
    asked, known = evidence.study.settings.get("framing", "auto"), catalogued(parted(backbone)[0])
    form = asked if asked != "auto" or known is None else "head" if known.kind == "encoder" else "text2text"
    return FORMS.get(form, "")


def _compared(evidence: Evidence) -> list[str]:
    """The methods that are tried on all tasks of the study; the others would leave few tasks to compare on."""
    some = {entry.label for entry in evidence.study.entries if entry.tasks}
    return [method for method in evidence.methods if method not in some]


def _averages(evidence: Evidence, backbone: str, scores: Scores, name: str, number: int) -> Section:
    methods = _compared(evidence)
    shared = complete(scores, methods)
    own = [record for record in evidence.done if record.backbone == backbone and record.method in methods]
    rows = []
    for method, records in grouped(own, lambda record: record.method).items():
        seeds = [
            mean.deviation
            for group in grouped(records, lambda record: record.task).values()
            if (mean := mean_of([record.score for record in group if record.score is not None])).deviation is not None
        ]
        means = [over_tasks(shared, method), over_categories(shared, method, evidence.categories)] if shared else []
        shares = [record.share for record in records if record.share is not None]
        rows.append(
            (
                method,
                *(f"{mean.value:.3f}" for mean in means),
                f"{means[0].low:.3f} to {means[0].high:.3f}" if means else "-",
                f"{fmean(one for one in seeds if one is not None):.3f}" if seeds else "-",
                f"{100 * fmean(shares):.3g}" if shares else "-",
                str(sum(record.degenerate for record in records) or "-"),
                f"{fmean(record.seconds or 0 for record in records):.1f}",
            )
        )
    rows.sort(key=lambda row: row[1], reverse=True)
    columns = ("method", "mean over tasks", "mean over categories", "95 % interval", "sd over seeds", "trained %", "degenerate", "seconds")
    note = (
        f"Over the {len(shared)} of {len(scores)} tasks on which every method has a score. The interval is a bootstrap over tasks; the "
        "standard deviation is that over seeds, averaged over tasks. Degenerate counts the trials that say the same to every test row. "
        "Seconds are of a whole trial." + _left_out(evidence)
    )
    pictures = (
        Picture(
            f"scores-{number}",
            draw_method_scores(method_scores(shared or scores, methods), methods),
            "Mean score over tasks with its 95 % interval; each grey stroke is a task.",
        ),
        Picture(
            f"shares-{number}",
            draw_shares(shares_of(own), methods),
            "Mean score against the share of parameters that train, heads included.",
        ),
    )
    table = Table(columns, rows, note=note) if shared else Table(columns[:1], [(row[0],) for row in rows])
    return Section(f"Averages{name}", form_of(evidence, backbone), (table, *pictures))


def _left_out(evidence: Evidence) -> str:
    some = [entry for entry in evidence.study.entries if entry.tasks and entry.label in evidence.methods]
    return "".join(f" {entry.label} was tried on {len(entry.tasks)} tasks and stands in the tables below alone." for entry in some)


def _ranking(evidence: Evidence, scores: Scores, name: str, number: int) -> Section:
    methods = _compared(evidence)
    found = ranks(scores, methods)
    if found is None:
        return Section(f"Ranks{name}")
    best = next(iter(found.average))
    pairs = paired(scores, [(best, other) for other in methods if other != best])
    rows = [
        (
            f"{one.method} - {one.other}",
            f"{one.difference:+.3f}",
            f"{one.low:+.3f} to {one.high:+.3f}",
            f"{one.wins:g} of {one.tasks}",
            f"{one.corrected:.2g}",
        )
        for one in pairs
    ]
    told = "" if found.p != found.p else f" Friedman's test that all are alike: p = {found.p:.2g}."
    picture = Picture(
        f"ranks-{number}", draw_ranks(found), "Average ranks, the best at the left; methods under one bar cannot be told apart (Nemenyi)."
    )
    note = "Wilcoxon's signed ranks across tasks, corrected by Holm for these comparisons; a tie counts half a win."
    columns = ("pair", "difference", "95 % interval", "better on", "p")
    return Section(f"Ranks{name}", f"Ranked on {found.tasks} tasks.{told}", (picture, Table(columns, rows, note=note)))


def _by_category(evidence: Evidence, scores: Scores, name: str, number: int) -> Section:
    table = categories_of(scores, evidence.categories, evidence.methods)
    if len(table.names) < 2:
        return Section(f"Categories{name}")
    picture = Picture(f"categories-{number}", draw_categories(table), "Mean score by category (tasks in it) and method; the best in bold.")
    return Section(f"Categories{name}", "", (picture,))


def _by_task(evidence: Evidence, backbone: str, scores: Scores, name: str) -> Section:
    methods = evidence.methods
    own = [record for record in evidence.done if record.backbone == backbone and record.method in methods]
    cells = grouped(own, lambda record: (record.task, record.method))
    rows, strong = [], set()
    for number, task in enumerate(sorted(scores, key=lambda task: (evidence.categories[task], task))):
        best = max(scores[task].values())
        row = [task, evidence.categories[task], next(record.metric for record in own if record.task == task)]
        for column, method in enumerate(methods, len(row)):
            records = cells.get((task, method), [])
            if not records:
                row.append("-")
                continue
            mean = mean_of([record.score for record in records if record.score is not None])
            row.append(f"{mean}{'*' if any(record.degenerate for record in records) else ''}")
            if mean.value == best:
                strong.add((number, column))
        rows.append(row)
    note = "Mean and standard deviation over seeds; the best in bold. * says the same to every test row."
    table = Table(("task", "category", "metric", *methods), rows, left=3, note=note, strong=frozenset(strong))
    return Section(f"Every task{name}", "", (table,))
