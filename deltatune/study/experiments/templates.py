"""Experiment 4, second part: what is a hand-written template worth, without training, with a few examples and with all?

Full: the eight tasks of the first part by label words on SmolLM2-135M, with the task's template and without, all subsets of adapter, BitFit
and prompt, and the frozen backbone; 16 examples of each class, and all examples; 40 steps of 8 rows each: 272 trials, about nine
core-hours. Forty steps see 320 of the rows where all are given. The paper's backbone fills in a mask; ours goes on writing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from deltatune.study.design import Entry, Profile, Study, baselines
from deltatune.study.experiments.basis import basis
from deltatune.study.experiments.combination import GLUE, PARTS, SUBSETS, effects, label_of, settings_of
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.generalization import BARE, DECODER
from deltatune.study.experiments.judging import all_of, better, lacking
from deltatune.study.plots.scores import draw_method_scores, method_scores
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, over_tasks, paired

ZERO = "frozen"
"""Answers without any training: the baseline of every study, and the same without the template."""

TRAINED = SUBSETS[1:]
LABELS = tuple(map(label_of, TRAINED))
FEW, WITH, WITHOUT = 16, "with", "without"
WORDS = {"framing": "text2text"}
"""Of STS-B, too, whose numbers a decoder would else give by a head."""

SETTINGS = {
    "max_steps": 40, "batch_size": 8, "max_length": 96, "evaluations": 2, "eval_rows": 32, "test_rows": 120, "eval_batch_size": 32,
}  # fmt: skip
POINTS = ({"shots": FEW}, {"shots": None})
LITTLE = 0.02
"""A gain below this is little."""


def design(profile: Profile) -> Study:
    """Every subset with the template and without; quick: one task, one part, a few steps."""
    full = profile == "full"
    base = basis(profile)
    subsets = TRAINED if full else TRAINED[:1]
    with_ = [baselines()[0], *(Entry(label_of(one), tuple(PARTS[part] for part in one)) for one in subsets)]
    bare = [replace(one, label=one.label + BARE, settings={"manual_template": False}) for one in with_]
    return replace(
        base,
        name=f"templates-{profile}",
        experiment="templates",
        backbones=(DECODER,),
        tasks=GLUE if full else ("glue-sst2",),
        methods=(*with_, *bare),
        settings=WORDS | (SETTINGS if full else {**SETTINGS, "max_steps": 3, "evaluations": 1, "eval_rows": 16, "test_rows": 32}),
        points=POINTS if full else POINTS[:1],
    )


def halves(evidence: Evidence, labels: Sequence[str] = LABELS) -> Scores:
    """Task -> ``with`` and ``without`` the template -> mean score of the labels, of tasks that have them all both ways."""
    shared = complete(evidence.scores(), [*labels, *(label + BARE for label in labels)])
    return {
        task: {WITH: fmean(row[label] for label in labels), WITHOUT: fmean(row[label + BARE] for label in labels)}
        for task, row in shared.items()
    }


def with_shots(evidence: Evidence, shots: int | None) -> Evidence:
    """The trials that saw so many examples of each class."""
    return evidence.narrowed(lambda record: record.cell.get("shots") == shots)


def lifts_zero_shot(evidence: Evidence) -> Judgement:
    """The frozen backbone scores better with the template."""
    return better(halves(evidence, [ZERO]), WITH, WITHOUT)


def helps_few_shot(evidence: Evidence) -> Judgement:
    """With 16 examples of each class, the mean of all subsets is better with the template."""
    return better(halves(with_shots(evidence, FEW)), WITH, WITHOUT)


def little_with_all(evidence: Evidence) -> Judgement:
    """With all examples, the template adds less than 0.02, or takes away: the interval decides."""
    scores = halves(with_shots(evidence, None))
    if (missing := lacking(scores, (WITH, WITHOUT))) is not None:
        return missing
    [one] = paired(scores, [(WITH, WITHOUT)])
    said = f"The template adds {one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}) over {one.tasks} tasks."
    return Judgement("holds" if one.high < LITTLE else "does not hold" if one.low > LITTLE else "undecided", said)


def helps(part: str, *, hurts: bool = False) -> Callable[[Evidence], Judgement]:
    """The judge of whether a part, put to others, raises scores with few examples and with all, with the template; or lowers them."""

    def judge(evidence: Evidence) -> Judgement:
        told = []
        for name, own in settings_of(evidence):
            one = better(effects(own.scores(), TRAINED)[part], *(("without", "with") if hurts else ("with", "without")))
            told.append(Judgement(one.verdict, f"{name}: {one.because}"))
        return all_of(told) if told else Judgement("undecided", "No scores.")

    return judge


def sections(evidence: Evidence) -> list[Section]:
    """The paper's table: every subset with the template and without, of each number of examples."""
    found = []
    for number, (name, own) in enumerate(settings_of(evidence)):
        scores, rows = own.scores(), []
        for label in (ZERO, *LABELS):
            shared = halves(own, [label])
            if shared:
                means = [over_tasks(shared, half) for half in (WITHOUT, WITH)]
                [gain] = paired(shared, [(WITH, WITHOUT)])
                rows.append(
                    (label, *(f"{mean.value:.3f}" for mean in means), f"{gain.difference:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}")
                )
        if not rows:
            continue
        methods = [label + ending for label, *_ in rows for ending in ("", BARE)]
        note = "Means over tasks. The frozen backbone sees no example, however many there are."
        table = Table(("trained", "without template", "with template", "gain", "95 % interval"), rows, note=note)
        figure = draw_method_scores(method_scores(scores, methods), methods)
        picture = Picture(f"templates-{number}", figure, "Mean over tasks with its 95 % interval; each grey stroke is a task.")
        found.append(Section(f"With and without a template, {name}", "", (table, picture)))
    return found


CLAIMS = (
    Claim("E11", "A template lifts answers without any training.", lifts_zero_shot),
    Claim("E11", "It helps clearly with 16 examples of each class.", helps_few_shot),
    Claim("E11", "With all examples it adds little (less than 0.02), or takes away.", little_with_all),
    Claim("E12", "In words, too, the adapter helps in combinations.", helps("AP")),
    Claim("E12", "In words, too, BitFit helps in combinations.", helps("BF")),
    Claim("E12", "In words, too, prompt tuning hurts in combinations.", helps("PT", hurts=True)),
)

experiments.register("templates")(Experiment("templates", "What is a hand-written template worth?", design, CLAIMS, sections))
