"""Experiment 9: what makes a prompt good: its start and length, its company, its template; and what a prefix owes to its MLP and its depth.

On SmolLM2-135M by label words. ``full`` has 15 methods and the two baselines on six tasks, one seed for the grid of starts and lengths and
three members for each ensemble: 102 trials of 200 steps of 8 texts, about sixteen hours on two cores, since long prompts make long texts.
``quick`` tries four methods for a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from deltatune.methods import EmbeddingPrefixTuning, Frozen, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.addition.prompt_tuning import Init
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import FEWEST, all_of, better, lacking, ordered, reaches
from deltatune.study.plots.series import draw_series
from deltatune.study.record import Record
from deltatune.study.report.comparison import comparison
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, mean_of, over_tasks, paired

STARTS: tuple[Init, ...] = ("labels", "vocabulary", "random")
LENGTHS, USUAL = (5, 20, 100), 20
ENSEMBLE, MLP, DIRECT, SHALLOW = "ensemble", "prefix-mlp", "prefix-direct", "prefix-embedding"
ZERO_SHOT, TUNED = "zero-shot", "tuned"
TASKS = ("glue-sst2", "tweet-sentiment", "subj", "ag-news", "glue-rte", "boolq")
"""Their label words are single tokens, so that one forward scores all of them."""

GAIN = 0.02
"""A gain of score below which a longer prompt is little better."""

SPREAD = 0.05
"""Difference between the best and the worst wording from which on a template counts as fragile."""


def label_of(start: str, length: int) -> str:
    """Of a prompt of that start and length."""
    return f"{start} {length}"


def design(profile: Profile) -> Study:
    """Full: three starts at three lengths, an ensemble, three prefixes, and templates asked with and without tuning."""
    full = profile == "full"
    lengths, starts = (LENGTHS, STARTS) if full else ((5,), STARTS[1:])
    entries = [
        Entry(label_of(start, length), (PromptTuning(num_virtual_tokens=length, init=start),)) for length in lengths for start in starts
    ]
    entries += [
        Entry(ENSEMBLE, (PromptTuning(num_virtual_tokens=USUAL),), procedure="ensemble", options={"members": 3 if full else 2}),
        *([Entry(MLP, (PrefixTuning(),)), Entry(DIRECT, (PrefixTuning(reparameterization=False),))] if full else []),
        *([Entry(SHALLOW, (EmbeddingPrefixTuning(),))] if full else []),
        Entry(ZERO_SHOT, (Frozen(),), procedure="templates"),
        *([Entry(TUNED, (LoRA(),), procedure="templates")] if full else []),
    ]
    common = {"framing": "text2text", "batch_size": 8, "max_length": 96, "eval_batch_size": 32}
    settings = {"max_steps": 200, "evaluations": 5, "eval_rows": 128, "test_rows": 256, "early_stopping": 4}
    short = {"max_steps": 4, "evaluations": 1, "eval_rows": 16, "test_rows": 32, "max_length": 48}
    return Study(
        name=f"prompts-{profile}",
        experiment="prompts",
        profile=profile,
        backbones=("smollm2-135m",),
        tasks=TASKS if full else ("tweet-sentiment",),
        methods=tuple(entries),
        settings={**common, **(settings if full else short)},
    )


def over_lengths(scores: Scores) -> Scores:
    """Task -> start -> mean score over the lengths, of tasks that have all."""
    shared = complete(scores, [label_of(start, length) for start in STARTS for length in LENGTHS])
    return {task: {start: fmean(row[label_of(start, length)] for length in LENGTHS) for start in STARTS} for task, row in shared.items()}


def starts_matter(evidence: Evidence) -> Judgement:
    """Label words before vocabulary before random numbers."""
    return ordered(over_lengths(evidence.scores()), STARTS)


def length_saturates(evidence: Evidence) -> Judgement:
    """A prompt of 100 tokens gains less than 0.02 over one of 20."""
    long, usual = label_of("vocabulary", LENGTHS[-1]), label_of("vocabulary", USUAL)
    if (missing := lacking(evidence.scores(), (long, usual))) is not None:
        return missing
    [one] = paired(evidence.scores(), [(long, usual)])
    said = f"{long} - {usual} = {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}) over {one.tasks} tasks."
    return Judgement("holds" if one.high < GAIN else "does not hold" if one.low > GAIN else "undecided", said)


def _ensembles(evidence: Evidence) -> list[Record]:
    return [record for record in evidence.done if "ensemble" in record.numbers]


def votes(evidence: Evidence) -> Scores:
    """Task -> the vote's score, and the members' mean and best."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in _ensembles(evidence):
        row = found.setdefault(record.task, {"vote": [], "mean": [], "best": []})
        row["vote"].append(record.score or 0.0)
        for name in ("mean", "best"):
            row[name].append(record.numbers["ensemble"][name])
    return {task: {name: fmean(values) for name, values in row.items()} for task, row in found.items()}


def pace(record: Record) -> float:
    """Seconds of the routed batches as a share of those of the members' own forwards, the first batch left out where there are more."""
    rounds = record.numbers["ensemble"]["rounds"]
    rounds = rounds[1:] or rounds
    return float(sum(one for one, _ in rounds) / sum(other for _, other in rounds))


def routing_is_cheap(evidence: Evidence) -> Judgement:
    """One routed batch takes no longer than the members one after the other, and a hundredth of the room of as many models."""
    found = _ensembles(evidence)
    if len({record.task for record in found}) < FEWEST:
        return Judgement("undecided", f"Fewer than {FEWEST} tasks have an ensemble.")
    mean = mean_of([pace(record) for record in found])
    room = max((record.delta_bytes or 0) / (4 * len(record.numbers["ensemble"]["singles"]) * (record.total or 1)) for record in found)
    said = (
        f"One routed batch takes {mean.value:.2f} of the time of the members' own ({mean.low:.2f} to {mean.high:.2f}); "
        f"their files are {room:.3%} of as many models in fp32."
    )
    verdict = Judgement("holds" if mean.high <= 1.1 else "does not hold" if mean.low > 1.1 else "undecided", said)
    return all_of([verdict, Judgement("holds" if room < 0.01 else "does not hold", said)])


def spreads(evidence: Evidence) -> Scores:
    """Task -> method -> difference between the best and the worst wording, the own one and those with one word changed."""
    found: Scores = {}
    for record in evidence.done:
        told = [one["score"] for one in record.numbers.get("templates", ()) if one["change"] != "other"]
        if told:
            found.setdefault(record.task, {})[record.method] = max(told) - min(told)
    return found


def templates_are_fragile(evidence: Evidence) -> Judgement:
    """Without tuning, one changed word moves the score."""
    scores = spreads(evidence)
    if (missing := lacking(scores, (ZERO_SHOT,))) is not None:
        return missing
    mean = over_tasks(scores, ZERO_SHOT)
    said = (
        f"One changed word moves the zero-shot score by up to {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) over {mean.count} tasks."
    )
    return Judgement("holds" if mean.low > SPREAD else "does not hold" if mean.high < SPREAD else "undecided", said)


def tuning_steadies(evidence: Evidence) -> Judgement:
    """The spread is smaller after tuning."""
    table = {task: {name: -value for name, value in row.items()} for task, row in spreads(evidence).items()}
    return better(table, TUNED, ZERO_SHOT)


def _of(judge: Callable[..., Judgement], *names: Any) -> Callable[[Evidence], Judgement]:
    return lambda evidence: judge(evidence.scores(), *names)


def sections(evidence: Evidence) -> list[Section]:
    """Starts and lengths, ensembles, templates, and all scores."""
    found = [_grid(evidence), _company(evidence), _wordings(evidence)]
    return [*(section for section in found if section is not None), *comparison(evidence)]


def _grid(evidence: Evidence) -> Section | None:
    scores = evidence.scores()
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for start in STARTS:
        points = []
        for length in LENGTHS:
            own = [row[label_of(start, length)] for row in scores.values() if label_of(start, length) in row]
            if own:
                mean = mean_of(own)
                points.append((float(length), mean.value, mean.low, mean.high))
        if points:
            lines[start] = points
    if not lines:
        return None
    figure = draw_series(lines, STARTS, "virtual tokens", "mean score")
    return Section("Start and length", "", (Picture("starts", figure, "Mean score over tasks by start and length of the prompt."),))


def _company(evidence: Evidence) -> Section | None:
    rows = [
        (
            record.task,
            str(len(told["singles"])),
            *(f"{told[name]:.3f}" for name in ("mean", "best", "averaged")),
            f"{record.score:.3f}",
            f"{pace(record):.2f}",
        )
        for record in _ensembles(evidence)
        for told in [record.numbers["ensemble"]]
    ]
    columns = ("task", "members", "mean", "best", "mean probability", "vote", "time")
    note = "Time of one routed batch, as a share of the members' own forwards one after the other. Mean and best are of the members alone."
    return Section("Ensembles", "", (Table(columns, rows, note=note),)) if rows else None


def _wordings(evidence: Evidence) -> Section | None:
    rows = []
    for record in evidence.done:
        told: Iterable[dict[str, Any]] = record.numbers.get("templates", ())
        changed = sorted((one["score"], one["change"]) for one in told if "->" in one["change"])
        if not changed:
            continue
        own = next(one["score"] for one in told if one["change"] == "own")
        others = [one["score"] for one in told if one["change"] == "other"]
        (low, worst), (high, best) = changed[0], changed[-1]
        shown = ", ".join(f"{value:.3f}" for value in others) or "-"
        rows.append((record.task, record.method, worst, best, f"{own:.3f}", f"{low:.3f}", f"{high:.3f}", f"{high - low:.3f}", shown))
    columns = ("task", "method", "worst word", "best word", "own template", "worst", "best", "spread", "other templates")
    note = "Scores on at most 256 test rows with one word of the template changed at a time. `tuned` was trained with the own template."
    return Section("One word changed", "", (Table(columns, rows, left=4, note=note),)) if rows else None


CLAIMS = (
    Claim("E27", "Label words are the best start, then vocabulary, then random numbers.", starts_matter),
    Claim("E27", "Beyond 20 tokens there is little gain (less than 0.02).", length_saturates),
    Claim("B9", "A prefix through its MLP is better than one that trains directly.", _of(better, MLP, DIRECT)),
    Claim("B11", "A prefix in every layer is better than one at the embeddings.", _of(better, MLP, SHALLOW)),
    Claim("E28", "An ensemble's vote is better than its prompts on average.", lambda evidence: better(votes(evidence), "vote", "mean")),
    Claim("E28", "It is as good as the best of them (at least 99 %).", lambda evidence: reaches(votes(evidence), "vote", "best", 0.99)),
    Claim("E28", "It is cheap: one batch instead of several models.", routing_is_cheap),
    Claim("E31", "Hand-written templates are fragile: one word moves the zero-shot score by 0.05 or more.", templates_are_fragile),
    Claim("E31", "After tuning they are less so.", tuning_steadies),
)

experiments.register("prompts")(Experiment("prompts", "What makes a prompt good?", design, CLAIMS, sections))
