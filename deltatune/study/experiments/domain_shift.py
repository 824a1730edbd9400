"""Experiment 13: trained on texts of one source, how good is each method on texts of sources it never saw?

Full: four sources in three families (sentiment with two labels and with three, inference, paraphrase) and thirteen sets of other sources
with the same labels, MiniLM with a head, seven methods, two seeds, trained as long as experiment 1: 72 trials, about two core-hours. No
two question answering sets at hand share their labels and their form, so that family is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, PROBE, PT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import better, lacking
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, over_tasks, paired

CAPITALS = {"Negative": "negative", "Positive": "positive"}
ELSEWHERE: Mapping[str, Sequence[Any]] = {
    "glue-sst2": ("yelp-labelled-sentences", {"task": "imdb-cad", "labels": CAPITALS}),
    "tweet-sentiment": ("crowdflower-tweets", "tweet-eval-sentiment", "financial-phrasebank", "meld-sentiment"),
    "snli": ("glue-mnli", "sick-entailment", "joci", "super-glue-cb", "fracas", "anli-r1"),
    "glue-mrpc": ({"task": "pan-paraphrase", "labels": {"not_paraphrase": "not_equivalent", "paraphrase": "equivalent"}},),
}
"""Source -> sets of other sources with the same labels. Rotten Tomatoes is left out beside SST-2, which was made from it."""

DELTAS = (LR, AP, PF, BF)


def design(profile: Profile) -> Study:
    """The methods of experiment 1, each trained on a source and scored on the others of its family."""
    full = profile == "full"
    base = basis(profile)
    labels = (FT, LR, AP, PF, PT, BF, PROBE) if full else (FT, LR, BF)
    options = {"also": {source: list(targets) for source, targets in ELSEWHERE.items()}}
    methods = tuple(replace(entry, procedure="elsewhere", options=options) for entry in base.methods if entry.label in labels)
    return replace(
        base,
        name=f"domain-shift-{profile}",
        experiment="domain-shift",
        tasks=tuple(ELSEWHERE) if full else ("glue-sst2",),
        methods=methods,
        seeds=(0, 1) if full else (0,),
    )


def away(evidence: Evidence) -> Scores:
    """``source -> set`` -> method -> mean score over seeds on a set that was never seen."""
    return _told(evidence, lambda found, home: found)


def drops(evidence: Evidence) -> Scores:
    """``source -> set`` -> method -> score on the source's test rows less that on the set."""
    return _told(evidence, lambda found, home: home - found)


def _told(evidence: Evidence, value: Callable[[float, float], float]) -> Scores:
    table: Scores = {}
    for (source, method), own in grouped(evidence.done, lambda record: (record.task, record.method)).items():
        names = [name for name in own[0].numbers.get("also", {}) if all(name in record.numbers.get("also", {}) for record in own)]
        for name in names:
            values = [value(record.numbers["also"][name]["score"], record.score or 0.0) for record in own]
            table.setdefault(f"{source} -> {name}", {})[method] = fmean(values)
    return table


def better_away(evidence: Evidence) -> Judgement:
    """On sets never seen the deltas are better than full fine-tuning, on average of the deltas and for none of them the other way round."""
    return _against(away(evidence), "deltas", FT, sign=1)


def drops_less(evidence: Evidence) -> Judgement:
    """From the source to a set never seen the deltas lose less than full fine-tuning."""
    return _against(drops(evidence), FT, "deltas", sign=-1)


def _against(scores: Scores, first: str, second: str, sign: int) -> Judgement:
    if (missing := lacking(scores, (FT, *DELTAS))) is not None:
        return missing
    shared = complete(scores, (FT, *DELTAS))
    table = {place: {FT: row[FT], "deltas": fmean(row[method] for method in DELTAS)} for place, row in shared.items()}
    told = better(table, first, second)
    each = paired(shared, [(method, FT) for method in DELTAS])
    said = "; ".join(f"{one.method} {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})" for one in each)
    reversed_ = [one for one in each if one.is_significant and sign * one.difference < 0]
    verdict = "undecided" if reversed_ and told.verdict == "holds" else told.verdict
    return Judgement(verdict, f"{told.because} Each, less {FT}: {said}.")


def sections(evidence: Evidence) -> list[Section]:
    """At home, away, and what is lost on the way; then every set."""
    found, lost = away(evidence), drops(evidence)
    methods = [method for method in evidence.methods if any(method in row for row in found.values())]
    shared, sources = complete(found, methods), {place.partition(" -> ")[0] for place in found}
    if not shared:
        return []
    home = {task: row for task, row in evidence.scores().items() if task in sources}
    rows = []
    for method in methods:
        out, drop = over_tasks(shared, method), over_tasks(complete(lost, methods), method)
        inside = over_tasks(complete(home, [method]), method)
        gained = "-"
        if FT in methods and method != FT:
            [one] = paired(shared, [(method, FT)])
            gained = f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        rows.append((method, f"{inside.value:.3f}", f"{out.value:.3f}", f"{out.low:.3f} to {out.high:.3f}", f"{drop.value:+.3f}", gained))
    columns = ("method", "at home", "away", "95 % interval", "lost", f"away, less {FT}")
    note = f"At home: mean over {len(home)} sources. Away: mean over {len(shared)} sets of other sources; lost: what they have less."
    picture = Picture(
        "away",
        draw_method_scores(method_scores(shared, methods), methods, "score on sets never seen"),
        "Mean score over sets of other sources with its 95 % interval; each grey stroke is a set.",
    )
    every = [(place, *(f"{row[method]:.3f}" if method in row else "-" for method in methods)) for place, row in sorted(found.items())]
    return [
        Section("At home and away", "", (Table(columns, rows, note=note), picture)),
        Section("Every set", "", (Table(("source -> set", *methods), every),)),
    ]


CLAIMS = (
    Claim("E26", "On domains never seen, training a delta gives better scores than training everything.", better_away),
    Claim("E26", "From its own domain to others, a delta loses less than training everything.", drops_less),
)

experiments.register("domain-shift")(
    Experiment("domain-shift", "Trained on one source, how good is each method on others?", design, CLAIMS, sections)
)
