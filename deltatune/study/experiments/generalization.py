"""Experiment 6: by how much is each method better on the rows it was trained on than on others?

Full: six tasks with 16 examples of each class, so few that they can be learnt by heart; eight methods on MiniLM with a head and, by label
words with the task's template and without, on SmolLM2-135M: 144 trials of 48 steps of 8 rows, about five core-hours, nearly all SmolLM2's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from deltatune.methods import FullFineTuning
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import FT, basis
from deltatune.study.experiments.combination import PARTS, SUBSETS, label_of
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better, level, reaches
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, mean_of, over_tasks

ENCODER, DECODER = "minilm", "smollm2-135m"
BARE = " without template"
"""Behind the label of a trial in which the columns stand alone."""

TASKS = ("glue-sst2", "glue-cola", "glue-mrpc", "snli", "subj", "ag-news")
SETTINGS = {"shots": 16, "max_steps": 48, "batch_size": 8, "max_length": 96, "evaluations": 2, "test_rows": 150}
COMBINED = [subset for subset in SUBSETS if len(subset) > 1]
ALL = label_of(COMBINED[-1])
LABELS = (FT, *map(label_of, SUBSETS[1:]))


def design(profile: Profile) -> Study:
    """Full fine-tuning, each part and every combination; on the decoder also without the template. Quick: one task and four methods."""
    full = profile == "full"
    base = basis(profile)
    subsets = SUBSETS[1:] if full else [("AP",), ("PT",), ("AP", "PT")]
    recipes = {FT: (FullFineTuning(),), **{label_of(subset): tuple(PARTS[part] for part in subset) for subset in subsets}}
    with_ = [Entry(label, methods, procedure="elsewhere", options={"also": ["train"]}) for label, methods in recipes.items()]
    bare = [replace(one, label=one.label + BARE, backbones=(DECODER,), settings={"manual_template": False}) for one in with_]
    return replace(
        base,
        name=f"generalization-{profile}",
        experiment="generalization",
        backbones=(ENCODER, DECODER),
        tasks=TASKS if full else base.tasks[1:],
        methods=(*with_, *bare),
        settings=SETTINGS if full else {**base.settings, "max_steps": 6, "test_rows": 64},
    )


def fits(evidence: Evidence) -> tuple[Scores, Scores]:
    """Scores on rows of the training, and what they have over those on held-out rows: task -> method -> mean over seeds."""
    trained: Scores = {}
    gaps: Scores = {}
    done = [record for record in evidence.done if "train" in record.numbers.get("also", {})]
    for (task, method), own in grouped(done, lambda record: (record.task, record.method)).items():
        found = fmean(record.numbers["also"]["train"]["score"] for record in own)
        trained.setdefault(task, {})[method] = found
        gaps.setdefault(task, {})[method] = found - fmean(record.score or 0.0 for record in own)
    return trained, gaps


def halves(evidence: Evidence) -> Iterator[tuple[str, Evidence]]:
    """The parts of the experiment that are judged by themselves: backbones, with the template and without; labels are the same in all."""
    for backbone in evidence.study.backbones:
        for name, ending in ((backbone, ""), (backbone + BARE, BARE)):
            called = {label + ending: label for label in LABELS}
            there = [record for record in evidence.done if record.backbone == backbone and record.method in called]
            own = [replace(record, method=called[record.method]) for record in there]
            if own:
                yield name, replace(evidence, records=own)


def everywhere(judge: Callable[[Scores, Scores], Judgement]) -> Callable[[Evidence], Judgement]:
    """The judge that asks the same of every half, given its scores on training rows and its gaps."""

    def judged(evidence: Evidence) -> Judgement:
        told = [(name, judge(*fits(own))) for name, own in halves(evidence)]
        found = all_of([Judgement(one.verdict, f"On {name}: {one.because}") for name, one in told])
        return found if told else Judgement("undecided", "No scores on training rows.")

    return judged


def single_below_full(trained: Scores, gaps: Scores) -> Judgement:
    """Each part alone has a smaller gap than full fine-tuning."""
    return all_of([better(gaps, FT, part) for part in PARTS])


def prompts_least(trained: Scores, gaps: Scores) -> Judgement:
    """Prompt tuning has the smallest gap of the three."""
    return all_of([better(gaps, part, "PT") for part in ("AP", "BF")])


def combining_widens(trained: Scores, gaps: Scores) -> Judgement:
    """The mean gap of the combinations is larger than that of the parts alone."""
    return better(means(gaps, {"combined": list(map(label_of, COMBINED)), "alone": list(PARTS)}), "combined", "alone")


def means(scores: Scores, groups: dict[str, list[str]]) -> Scores:
    """Task -> name of a group -> mean over its methods, of the tasks that have them all."""
    shared = complete(scores, [method for group in groups.values() for method in group])
    return {task: {name: fmean(row[method] for method in group) for name, group in groups.items()} for task, row in shared.items()}


def templates_matter_little(evidence: Evidence) -> Judgement:
    """With the template and without, the mean gap of the methods is level."""
    own = evidence.narrowed(lambda record: record.backbone == DECODER)
    labels = [label for label in LABELS if {label, label + BARE} <= set(own.methods)]
    if not labels:
        return Judgement("undecided", "No method has scores with the template and without.")
    groups = {"with": labels, "without": [label + BARE for label in labels]}
    return level(means(fits(own)[1], groups), "with", "without", 0.03)


def sections(evidence: Evidence) -> list[Section]:
    """For each half: scores on training rows and on others, and the gap between them."""
    found = []
    for number, (name, own) in enumerate(halves(evidence)):
        trained, gaps = fits(own)
        methods = [label for label in LABELS if any(label in row for row in gaps.values())]
        if not methods:
            continue
        picture = Picture(
            f"gaps-{number}",
            draw_method_scores(method_scores(gaps, methods), methods, "score on training rows less that on test rows"),
            "Mean gap over tasks with its 95 % interval; each grey stroke is a task.",
        )
        found.append(Section(f"Gaps on {name}", "", (_table(own, trained, gaps, methods), picture)))
    return found


def _table(evidence: Evidence, trained: Scores, gaps: Scores, methods: Sequence[str]) -> Table:
    held, rows = evidence.scores(), []
    for method in methods:
        gap = mean_of([row[method] for row in gaps.values() if method in row])
        on, off = (over_tasks(complete(scores, [method]), method).value for scores in (trained, held))
        rows.append((method, f"{on:.3f}", f"{off:.3f}", f"{gap.value:+.3f}", f"{gap.low:+.3f} to {gap.high:+.3f}", str(gap.count)))
    return Table(("method", "training rows", "test rows", "gap", "95 % interval", "tasks"), rows)


CLAIMS = (
    Claim("E14", "A single delta has a smaller gap than full fine-tuning.", everywhere(single_below_full)),
    Claim("E14", "Prompt tuning has the smallest gap of the three.", everywhere(prompts_least)),
    Claim("E14", "Combining deltas widens the gap.", everywhere(combining_widens)),
    Claim(
        "E14",
        "All three together have about the gap of full fine-tuning (within 0.03).",
        everywhere(lambda trained, gaps: level(gaps, ALL, FT, 0.03)),
    ),
    Claim("E14", "Templates hardly matter to the gap (within 0.03).", templates_matter_little),
    Claim(
        "E34",
        "Deltas learn the training rows by heart though they are small (95 % of full fine-tuning's score on them).",
        everywhere(lambda trained, gaps: all_of([reaches(trained, part, FT, 0.95) for part in PARTS])),
    ),
)

experiments.register("generalization")(
    Experiment("generalization", "How much better is each method on the rows it was trained on than on others?", design, CLAIMS, sections)
)
