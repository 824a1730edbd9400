"""Experiment 4, first part: adapter, BitFit and prompt tuning trained together, in all eight subsets; what does each add?

Full: eight tasks on MiniLM with a head, two seeds, 16 examples of each class and 128 in all: 320 trials, about four core-hours. Templates
and zero-shot answers are of label words; they are in the second part, ``templates``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean

from deltatune.methods import Adapter, BitFit, LinearProbe, PromptTuning
from deltatune.methods.kinds import Method
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better
from deltatune.study.report.comparison import comparison
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, paired

PARTS: Mapping[str, Method] = {"AP": Adapter(), "BF": BitFit(), "PT": PromptTuning(num_virtual_tokens=10)}
"""With as many virtual tokens as the paper's combinations have."""

NONE = "none"
GLUE = ("glue-cola", "glue-sst2", "glue-mrpc", "stsb", "pan-paraphrase", "glue-mnli", "glue-qnli", "glue-rte")
"""The paper's eight, with PAN's paraphrases in place of QQP, which the mirror does not have."""

SETTINGS = {"max_length": 64, "batch_size": 8, "max_steps": 240, "evaluations": 12, "early_stopping": 4, "eval_rows": 128, "test_rows": 300}

SUBSETS = [subset for count in range(4) for subset in combinations(PARTS, count)]


def label_of(subset: tuple[str, ...]) -> str:
    """``AP+BF``; the empty one trains the head alone."""
    return "+".join(subset) or NONE


def design(profile: Profile) -> Study:
    """Full: the GLUE tasks at hand, with 16 examples of each class and with a larger sample, two seeds."""
    base = basis(profile)
    methods = tuple(Entry(label_of(subset), tuple(PARTS[part] for part in subset) or (LinearProbe(),)) for subset in SUBSETS)
    return replace(
        base,
        name=f"combination-{profile}",
        experiment="combination",
        tasks=GLUE if profile == "full" else base.tasks,
        methods=methods,
        settings=SETTINGS if profile == "full" else base.settings,
        points=({"shots": 16}, {"train_rows": 128}) if profile == "full" else ({"shots": 16},),
        seeds=(13, 21) if profile == "full" else (13,),
    )


def effects(scores: Scores, subsets: Sequence[tuple[str, ...]] = SUBSETS) -> dict[str, Scores]:
    """Part -> task -> mean score of the subsets that have it, and of the same ones without it, as far as both are among ``subsets``."""
    labels = [label_of(subset) for subset in subsets]
    shared = complete(scores, labels)
    found: dict[str, Scores] = {}
    for part in PARTS:
        without = [subset for subset in subsets if part not in subset]
        with_ = [subset for subset in subsets if part in subset and tuple(one for one in subset if one != part) in without]
        found[part] = {
            task: {"with": fmean(row[label_of(one)] for one in with_), "without": fmean(row[label_of(one)] for one in without)}
            for task, row in shared.items()
        }
    return found


def settings_of(evidence: Evidence) -> list[tuple[str, Evidence]]:
    """The cells of the grid, each with what its trials say."""
    values = list(dict.fromkeys(record.cell.get("shots") for record in evidence.done))
    more = next((cell["train_rows"] for cell in evidence.study.cells if "train_rows" in cell), "all")
    return [(f"{more} examples" if value is None else f"{value} of each class", _with_shots(evidence, value)) for value in values]


def _with_shots(evidence: Evidence, shots: int | None) -> Evidence:
    return evidence.narrowed(lambda record: record.cell.get("shots") == shots)


def helps(part: str, *, hurts: bool = False) -> Callable[[Evidence], Judgement]:
    """The judge of whether a part raises scores in every cell of the grid, or lowers them."""

    def judge(evidence: Evidence) -> Judgement:
        told = []
        for name, own in settings_of(evidence):
            first, second = ("without", "with") if hurts else ("with", "without")
            one = better(effects(own.scores())[part], first, second)
            told.append(Judgement(one.verdict, f"{name}: {one.because}"))
        return all_of(told) if told else Judgement("undecided", "No scores.")

    return judge


def sections(evidence: Evidence) -> list[Section]:
    """What each part adds, then all subsets; of each cell by itself."""
    rows = []
    for name, own in settings_of(evidence):
        for part, scores in effects(own.scores()).items():
            if scores:
                [one] = paired(scores, [("with", "without")])
                rows.append((name, part, f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}", f"{one.wins:g} of {one.tasks}"))
    columns = ("examples", "part", "adds", "95 % interval", "better on")
    note = "Mean score of the four subsets with the part, less that of the four without it."
    first = [Section("What each part adds", "", (Table(columns, rows, left=2, note=note),))] if rows else []
    cells = enumerate(settings_of(evidence))
    return [*first, *(_of_cell(section, number, name) for number, (name, own) in cells for section in comparison(own))]


def _of_cell(section: Section, number: int, name: str) -> Section:
    """A section that says of which cell it is, with pictures of names of its own."""
    blocks = (replace(block, name=f"cell-{number}-{block.name}") if isinstance(block, Picture) else block for block in section.blocks)
    return replace(section, title=f"{section.title}, {name}", blocks=tuple(blocks))


CLAIMS = (
    Claim("E12", "The adapter helps in combinations.", helps("AP")),
    Claim("E12", "BitFit helps in combinations.", helps("BF")),
    Claim("E12", "Prompt tuning hurts in combinations.", helps("PT", hurts=True)),
)

experiments.register("combination")(
    Experiment("combination", "Adapter, BitFit and prompt together: what does each add?", design, CLAIMS, sections)
)
