"""Experiment 8: what is a delta of one task worth on another, as it is and as a place to start from?

Full: prompt, prefix, adapter and LoRA on twelve tasks of five types, text-to-text on SmolLM2-135M, 120 steps of 8 rows each, scored on the
eleven others by their own words; random deltas of each method; and prompt and LoRA trained on, from each task to the next in the list: 72
trainings and 60 baselines, about 25 core-hours. The paper's tasks are not known for sure; these are of its types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from deltatune.methods import Adapter, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.kinds import Method
from deltatune.study.design import RANDOM, Entry, Profile, Study
from deltatune.study.experiments.basis import AP, LR, PF, PT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, Verdict, experiments
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import FEWEST, all_of, better
from deltatune.study.plots.curves import Curve, curves_of
from deltatune.study.plots.transfer import draw_transfers, transfers_of
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, grouped, mean_of

TYPES: Mapping[str, tuple[str, ...]] = {
    "sentiment": ("glue-sst2", "yelp-labelled-sentences", "financial-phrasebank"),
    "inference": ("glue-mnli", "sick-entailment", "snli"),
    "paraphrase": ("glue-mrpc", "pan-paraphrase"),
    "question answering": ("babi-qa1", "babi-qa15"),
    "summarization": ("aeslc", "meqsum"),
}
"""Rotten Tomatoes is left out beside SST-2, which was made from it; of what SmolLM2-135M can learn in 120 steps."""

NAMED = tuple(task for tasks in TYPES.values() for task in tasks)
TYPE_OF = {task: kind for kind, tasks in TYPES.items() for task in tasks}
GENERATION = ("question answering", "summarization")
"""Types whose answers are written, here and in the paper."""

RECIPES: Mapping[str, Method] = {PT: PromptTuning(num_virtual_tokens=20), PF: PrefixTuning(), AP: Adapter(), LR: LoRA()}
RANDOMS = {label: RANDOM if label == LR else f"random {label}" for label in RECIPES}
"""Method -> its random delta; that of LoRA is in every study."""

EXCEPTION = "generation, on sentiment"
FURTHER = ", behind the task before"
STARTED = (PT, LR)
SETTINGS = {"max_steps": 120, "batch_size": 8, "max_length": 128, "evaluations": 6, "eval_rows": 64, "test_rows": 128}
LEAST = 0.05
"""A native score below this is no measure of others."""

GOOD, GOAL, MARGIN = 0.8, 0.95, 0.05
"""Relative scores that are good; share of the score from scratch that has to be reached; what is level with a random delta."""


def design(profile: Profile) -> Study:
    """Every method on every task, random deltas, and training from one task to the next; quick: three tasks and two methods."""
    full = profile == "full"
    base = basis(profile)
    names = NAMED if full else ("glue-sst2", "yelp-labelled-sentences", "babi-qa1")
    recipes = RECIPES if full else {label: RECIPES[label] for label in (PT, LR)}
    others = {"also": {source: [name for name in names if name != source] for source in names}, "asked": "as itself"}
    native = [Entry(label, (method,), procedure="elsewhere", options=others) for label, method in recipes.items()]
    random = [Entry(RANDOMS[label], (method,), procedure="untrained") for label, method in recipes.items() if label != LR]
    ring = {"tasks": list(names), "most": 2}
    further = [Entry(label + FURTHER, (recipes[label],), procedure="stream", options=ring) for label in STARTED if full or label == LR]
    return replace(
        base,
        name=f"transfer-{profile}",
        experiment="transfer",
        backbones=(DECODER,),
        tasks=names,
        methods=(*native, *random, *further),
        settings=SETTINGS if full else {**base.settings, "max_steps": 3, "evaluations": 1, "eval_rows": 16, "test_rows": 32},
    )


def relative(evidence: Evidence, method: str) -> dict[tuple[str, str], float]:
    """(source, target) -> score of the source's delta on the target over that of the target's own delta.

    Sources are tasks, ``random`` and ``frozen``. Targets whose own delta has next to no score are left out.
    """
    scores, found = evidence.scores(), {}
    native = {task: row[method] for task, row in scores.items() if row.get(method, 0.0) >= LEAST and task in TYPE_OF}
    for target, own in native.items():
        for name, label in (("random", RANDOMS[method]), ("frozen", "frozen")):
            if label in scores[target]:
                found[name, target] = scores[target][label] / own
    for source, records in grouped(evidence.done, lambda record: record.task if record.method == method else "").items():
        for target in native:
            told = [record.numbers["also"][target]["score"] for record in records if target in record.numbers.get("also", {})]
            if source in TYPE_OF and told:
                found[source, target] = fmean(told) / native[target]
    return found


def by_kind(evidence: Evidence) -> Scores:
    """Target -> kind of source -> relative score; mean over sources, then over methods."""
    cells: dict[str, dict[str, list[float]]] = {}
    for method in RECIPES:
        for target, row in _groups(relative(evidence, method)).items():
            for kind, values in row.items():
                cells.setdefault(target, {}).setdefault(kind, []).append(fmean(values))
    return {target: {kind: fmean(values) for kind, values in row.items()} for target, row in cells.items()}


def _groups(found: Mapping[tuple[str, str], float]) -> dict[str, dict[str, list[float]]]:
    groups: dict[str, dict[str, list[float]]] = {}
    for (source, target), value in found.items():
        kind = _kind(source, target)
        groups.setdefault(target, {}).setdefault(kind, []).append(value)
    return groups


def _kind(source: str, target: str) -> str:
    """What a cell of the matrix counts as; the paper's exception across types is judged by itself."""
    if source not in TYPE_OF:
        return source
    if TYPE_OF[source] == TYPE_OF[target]:
        return "own type"
    return EXCEPTION if TYPE_OF[source] in GENERATION and TYPE_OF[target] == "sentiment" else "other types"


def within_types(evidence: Evidence) -> Judgement:
    """Deltas of the target's own type are better than those of other types, and than random ones."""
    scores = by_kind(evidence)
    return all_of([better(scores, "own type", "other types"), better(scores, "own type", "random")])


def across_types(evidence: Evidence) -> Judgement:
    """Deltas of other types are not worth more than random ones: the interval of what they have more decides."""
    told = [row["other types"] - row["random"] for row in by_kind(evidence).values() if {"other types", "random"} <= row.keys()]
    if len(told) < FEWEST:
        return Judgement("undecided", f"Only {len(told)} targets; {FEWEST} are needed.")
    mean = mean_of(told)
    said = f"other types - random = {mean.value:+.3f} of the native score ({mean.low:+.3f} to {mean.high:+.3f}) over {len(told)} targets."
    return Judgement("holds" if mean.high <= MARGIN else "does not hold" if mean.low > MARGIN else "undecided", said)


def generation_to_sentiment(evidence: Evidence) -> Judgement:
    """Deltas of written answers, on sentiment: good by themselves, and better than random ones."""
    pairs: dict[str, dict[str, list[float]]] = {}
    for method in RECIPES:
        found = relative(evidence, method)
        for (source, target), value in found.items():
            if _kind(source, target) == EXCEPTION and ("random", target) in found:
                row = pairs.setdefault(f"{source} -> {target}", {"generation": [], "random": []})
                row["generation"].append(value)
                row["random"].append(found["random", target])
    scores = {place: {name: fmean(values) for name, values in row.items()} for place, row in pairs.items()}
    if len(scores) < FEWEST:
        return Judgement("undecided", f"Only {len(scores)} pairs of tasks; {FEWEST} are needed.")
    mean = mean_of([row["generation"] for row in scores.values()])
    verdict: Verdict = "holds" if mean.low >= GOOD else "does not hold" if mean.high < GOOD else "undecided"
    said = f"Relative score {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) over {len(scores)} pairs."
    return all_of([Judgement(verdict, said), better(scores, "generation", "random")])


def started(evidence: Evidence) -> Iterator[tuple[str, str, str, Curve, Curve]]:
    """(method, source, target, curve on the target from scratch, curve behind the source) of each training that went on."""
    cells = grouped(evidence.done, lambda record: (record.task, record.method))
    for method in STARTED:
        for (source, label), records in cells.items():
            tasks = [stage["task"] for stage in records[0].numbers.get("stages", [])]
            if label != method + FURTHER or len(tasks) < 2 or (tasks[1], method) not in cells:
                continue
            fresh = curves_of([evidence.curve(record.key) for record in cells[tasks[1], method]])
            later = curves_of([_history(record.numbers["stages"][1]["curve"]) for record in records])
            if fresh and later:
                yield method, source, tasks[1], fresh, later


def _history(curve: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    return [{"step": step, "eval_score": score} for step, score in curve]


def arrivals(evidence: Evidence) -> Scores:
    """``source -> target`` -> minus the steps to 95 % of the best score from scratch, as a share of all; never is twice that."""
    found: dict[str, dict[str, list[float]]] = {}
    for _, source, target, fresh, later in started(evidence):
        goal, last = GOAL * max(score for _, score in fresh), fresh[-1][0]
        row = found.setdefault(f"{source} -> {target}", {"from scratch": [], "behind another task": []})
        for name, curve in (("from scratch", fresh), ("behind another task", later)):
            row[name].append(-next((step / last for step, score in curve if score >= goal), 2.0))
    return {place: {name: fmean(values) for name, values in row.items()} for place, row in found.items()}


def sections(evidence: Evidence) -> list[Section]:
    """The matrix of each method, the means by type, and the trainings that went on."""
    found = []
    for number, method in enumerate(RECIPES):
        cells = relative(evidence, method)
        targets = [name for name in NAMED if any(target == name for _, target in cells)]
        sources = [name for name in (*NAMED, "random", "frozen") if any(source == name for source, _ in cells)]
        if any(source in TYPE_OF for source in sources):
            caption = "Score of the row's delta on the column's task, in percent of that of the task's own delta."
            picture = Picture(f"transfer-{number}", draw_transfers(transfers_of(cells, sources, targets)), caption)
            found.append(Section(f"Transfer of {method}", "", (_by_type(cells), picture)))
    return [*_summary(evidence), *found, *_further(evidence)]


def _by_type(cells: Mapping[tuple[str, str], float]) -> Table:
    rows = []
    for source in (*TYPES, "random", "frozen"):
        row = [source]
        for target in TYPES:
            own = [value for (one, other), value in cells.items() if TYPE_OF.get(one, one) == source and TYPE_OF[other] == target]
            row.append(f"{100 * fmean(own):.0f}" if own else "-")
        rows.append(row)
    return Table(("from", *TYPES), rows, note="Percent of the native score, means over pairs of different tasks.")


def _summary(evidence: Evidence) -> list[Section]:
    scores, rows = by_kind(evidence), []
    for kind in ("own type", "other types", EXCEPTION, "random", "frozen"):
        own = [row[kind] for row in scores.values() if kind in row]
        if own:
            mean = mean_of(own)
            rows.append((kind, f"{100 * mean.value:.1f}", f"{100 * mean.low:.1f} to {100 * mean.high:.1f}", str(mean.count)))
    note = "Percent of the score of the target's own delta; means over sources and methods, with a bootstrap interval over targets."
    return (
        [Section("Transfer by type", "", (Table(("delta of", "relative score", "95 % interval", "targets"), rows, note=note),))]
        if rows
        else []
    )


def _further(evidence: Evidence) -> list[Section]:
    rows = []
    for method, source, target, fresh, later in started(evidence):
        best = [max(score for _, score in curve) for curve in (fresh, later)]
        early = [curve[0][1] for curve in (fresh, later)]
        alike = "own" if TYPE_OF.get(source) == TYPE_OF.get(target) else "other"
        rows.append((method, source, target, alike, *(f"{value:.3f}" for value in (*early, *best))))
    columns = ("method", "from", "to", "type", "first, from scratch", "first, behind", "best, from scratch", "best, behind")
    note = "Validation scores at the first look and at the best one."
    return [Section("As a place to start from", "", (Table(columns, rows, left=4, note=note),))] if rows else []


CLAIMS = (
    Claim("E21", "Within a type, a delta of another task is better than one of another type, and than a random one.", within_types),
    Claim(
        "E21",
        f"Deltas of question answering and summarization are good on sentiment ({GOOD:.0%} of the native score, and above a random one).",
        generation_to_sentiment,
    ),
    Claim("E21", f"Across types but for that, a delta is worth no more than a random one (within {MARGIN}).", across_types),
    Claim(
        "E20",
        "Training that starts from another task's delta needs fewer steps.",
        lambda evidence: better(arrivals(evidence), "behind another task", "from scratch"),
    ),
)

experiments.register("transfer")(Experiment("transfer", "What is a delta of one task worth on another?", design, CLAIMS, sections))
