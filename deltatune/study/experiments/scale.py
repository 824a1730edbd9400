"""Experiment 7: does delta tuning gain with the size of the backbone, and do methods become alike?

A claim about scale speaks of one family's models of several sizes, each pretrained. What installs here has no such ladder: the backbones of
the design are models cut to fewer layers, and two families, which are controls. So every verdict stays undecided until three sizes of one
family are named in a ``study.yaml`` (such as t5-small, t5-base, t5-large) with two seeds or more; the report shows the controls meanwhile.
``full`` has 165 trials, about ten hours on two cores; ``quick`` a few minutes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from deltatune.methods import Adapter, FullFineTuning, LastLayer, LoRA, PrefixTuning, PromptTuning, SelectiveModules
from deltatune.methods.kinds import Method
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.basis import AP, FT, LR, PF, PT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, Verdict, experiments
from deltatune.study.experiments.judging import all_of, better, lacking, ratio_of, reaches
from deltatune.study.plots.series import Points, draw_series
from deltatune.study.report.comparison import comparison
from deltatune.study.report.parts import Picture, Section, Table
from deltatune.study.statistics import Scores, complete, grouped, mean_of, over_tasks

LL, SM = "last-layer", "selective-modules"
METHODS = (AP, LR, PF, PT, LL, SM)
"""The paper's six, beside full fine-tuning."""

SWEEP = {f"lora-{name}": LoRA(rank=rank, alpha=2.0 * rank) for name, rank in (("1-top", 1), ("1", 1), ("4", 4), ("32", 32))}
"""Other shares of parameters; the first sits in the last layer alone."""

TASKS = ("glue-mnli", "glue-qnli", "glue-sst2")
SIZES, GOAL, TINY = 3, 0.95, 0.00008
"""Of a ladder at least; the share of full fine-tuning's score to be reached; the share of parameters that the paper says can be enough."""

_SIZE = re.compile(r"(?<![a-z])(tiny|mini|small|medium|base|large|xl|xxl|\d+(\.\d+)?[mb])(?![a-z0-9])", re.IGNORECASE)


def design(profile: Profile) -> Study:
    """Full fine-tuning, six methods and four more ranks on MNLI, QNLI and SST-2; full: five controls."""
    full, base = profile == "full", basis(profile)
    recipes: tuple[Method, ...] = (FullFineTuning(), Adapter(), LoRA(), PrefixTuning(), PromptTuning(), LastLayer(), SelectiveModules())
    entries = [Entry(label, (recipe,)) for label, recipe in zip((FT, *METHODS), recipes, strict=True) if full or label in (FT, LR)]
    entries += [Entry(label, (method,), layers="top:1" if "top" in label else None) for label, method in SWEEP.items()] if full else []
    controls = ("minilm@layers=1", "minilm@layers=3", "minilm", "smollm2-135m@layers=10", "smollm2-135m")
    settings = {
        "max_steps": 300,
        "batch_size": 8,
        "max_length": 96,
        "evaluations": 6,
        "early_stopping": 5,
        "eval_rows": 128,
        "test_rows": 512,
    }
    return replace(
        base,
        name=f"scale-{profile}",
        experiment="scale",
        backbones=controls if full else ("minilm@layers=1", "minilm"),
        tasks=TASKS if full else base.tasks,
        methods=tuple(entries),
        settings=settings if full else base.settings,
    )


def family_of(backbone: str) -> str | None:
    """What a model's name says besides its size; None of a control.

    >>> family_of("google-t5/t5-base"), family_of("smollm2-135m"), family_of("minilm@layers=3")
    ('google-t5/t5-', 'smollm2-', None)
    """
    return None if "@" in backbone else _SIZE.sub("", backbone)


def sizes(evidence: Evidence, backbones: Sequence[str]) -> list[str]:
    """Backbones that have scores, the smallest first."""
    totals = {record.backbone: record.total or 0 for record in evidence.done if record.backbone in backbones}
    return sorted(totals, key=totals.__getitem__)


def ladder(evidence: Evidence) -> list[str]:
    """Pretrained models of one family, the smallest first, where there are three sizes with scores; else nothing."""
    own: dict[str, list[str]] = {}
    for backbone in evidence.study.backbones:
        if (family := family_of(backbone)) is not None:
            own.setdefault(family, []).append(backbone)
    found = [sizes(evidence, backbones) for backbones in own.values()]
    longest = max(found, key=len, default=[])
    return longest if len(longest) >= SIZES else []


def units(evidence: Evidence, backbone: str) -> Scores:
    """(task, seed) -> method -> score, on one backbone."""
    return {
        f"{task}, seed {seed}": {record.method: record.score for record in records if record.score is not None}
        for (task, seed), records in grouped(
            (record for record in evidence.done if record.backbone == backbone), lambda record: (record.task, record.seed)
        ).items()
    }


def spread(scores: Scores) -> dict[str, float]:
    """Unit -> best less worst of the methods, of units that have all but the prompt, which is poor when small."""
    return {unit: max(row.values()) - min(row.values()) for unit, row in complete(scores, [one for one in METHODS if one != PT]).items()}


def least_share(evidence: Evidence, backbone: str) -> tuple[float, str] | None:
    """The smallest trained share of a method whose mean score reaches 95 % of full fine-tuning's, and the method; None if none does."""
    scores, reached = units(evidence, backbone), []
    for record in (one for one in evidence.done if one.backbone == backbone and one.share and one.method != FT):
        shared = complete(scores, (record.method, FT))
        if shared and ratio_of(shared, record.method, FT)[0] >= GOAL:
            reached.append((record.share or 0.0, record.method))
    return min(reached, default=None)


def on_ladder(judge: Callable[[Evidence, list[str]], Judgement]) -> Callable[[Evidence], Judgement]:
    """The judge, where there is a ladder to judge by."""

    def judged(evidence: Evidence) -> Judgement:
        rungs = ladder(evidence)
        if not rungs:
            there = ", ".join(sizes(evidence, evidence.study.backbones)) or "nothing"
            said = f"It takes {SIZES} sizes of one pretrained family; there is {there}. Layers cut off and other families are controls."
            return Judgement("undecided", said)
        return judge(evidence, rungs)

    return judged


def _pairs(first: dict[str, float], last: dict[str, float]) -> Scores:
    return {unit: {"small": first[unit], "large": last[unit]} for unit in first if unit in last}


def all_gain(evidence: Evidence, rungs: list[str]) -> Judgement:
    """Each method scores higher on the largest than on the smallest."""
    small, large = units(evidence, rungs[0]), units(evidence, rungs[-1])
    told = []
    for method in METHODS:
        first, last = ({unit: row[method] for unit, row in side.items() if method in row} for side in (small, large))
        one = better(_pairs(first, last), "large", "small")
        told.append(Judgement(one.verdict, f"{method}: {one.because}"))
    return all_of(told)


def differences_shrink(evidence: Evidence, rungs: list[str]) -> Judgement:
    """The spread of the methods is smaller on the largest."""
    small, large = (spread(units(evidence, backbone)) for backbone in (rungs[0], rungs[-1]))
    return better(_pairs(large, small), "large", "small")  # named for the spread: the smallest backbone's is the large one


def prompts_catch_up(evidence: Evidence, rungs: list[str]) -> Judgement:
    """Prompt tuning falls short of 95 % of full fine-tuning on the smallest, and reaches it on the largest."""
    small, large = (reaches(units(evidence, backbone), PT, FT, GOAL) for backbone in (rungs[0], rungs[-1]))
    turned: dict[Verdict, Verdict] = {"holds": "does not hold", "does not hold": "holds", "undecided": "undecided"}
    short = Judgement(turned[small.verdict], f"{rungs[0]}: {small.because}")
    return all_of([short, Judgement(large.verdict, f"{rungs[-1]}: {large.because}")])


def spread_out_is_better(evidence: Evidence, rungs: list[str]) -> Judgement:
    """Selective modules beat the last layer on the largest."""
    return better(units(evidence, rungs[-1]), SM, LL)


def little_is_enough(evidence: Evidence, rungs: list[str]) -> Judgement:
    """0.008 % of the largest reach 95 % of full fine-tuning, and a smaller share than of the smallest."""
    for backbone in (rungs[0], rungs[-1]):
        if (missing := lacking(units(evidence, backbone), (FT, LR))) is not None:
            return missing
    small, large = least_share(evidence, rungs[0]), least_share(evidence, rungs[-1])
    if large is None:
        return Judgement("does not hold", f"On {rungs[-1]} no delta reaches {GOAL:.0%} of {FT}.")
    before = "none does" if small is None else f"{small[0]:.4%} by {small[1]}"
    said = f"The least share that reaches {GOAL:.0%} is {large[0]:.4%} on {rungs[-1]}, by {large[1]}; on {rungs[0]} {before}."
    less = small is None or large[0] < small[0]
    return Judgement("holds" if less and large[0] <= TINY else "does not hold", said)


def spread_lines(evidence: Evidence) -> dict[str, Points]:
    """Model, or what it is cut from -> (parameters, mean spread of the methods with its interval)."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for backbone in sizes(evidence, evidence.study.backbones):
        if values := list(spread(units(evidence, backbone)).values()):
            mean, total = mean_of(values), next(one.total or 1 for one in evidence.done if one.backbone == backbone)
            name = family_of(backbone.partition("@")[0]) or backbone
            lines.setdefault(name.rstrip("-"), []).append((float(total), mean.value, mean.low, mean.high))
    return dict(lines)


def sections(evidence: Evidence) -> list[Section]:
    """Scores by size, the spread of the methods, the least share, and then each backbone."""
    backbones, rows = sizes(evidence, evidence.study.backbones), []
    if not backbones:
        return []
    for backbone in backbones:
        scores, least = units(evidence, backbone), least_share(evidence, backbone)
        total = next(one.total or 0 for one in evidence.done if one.backbone == backbone)
        spreads = list(spread(scores).values())
        means = [f"{over_tasks(shared, one).value:.3f}" if (shared := complete(scores, [one])) else "-" for one in (FT, *METHODS)]
        told = "-" if least is None else f"{least[0]:.4%} ({least[1]})"
        rows.append((backbone, f"{total / 1e6:,.1f}", *means, f"{fmean(spreads):.3f}" if spreads else "-", told))
    columns = ("backbone", "million", FT, *METHODS, "spread", f"least share for {GOAL:.0%}")
    note = (
        "Mean scores over tasks and seeds, the smallest backbone first. The spread is best less worst of the methods but prompt tuning. "
        "A name with @layers is a model cut to its lowest layers, a control: it was never pretrained at this size."
    )
    lines = spread_lines(evidence)
    figure = draw_series(lines, list(lines), "parameters", "best less worst") if lines else None
    pictures = [] if figure is None else [Picture("spread", figure, "Spread of the methods by size of the backbone.")]
    return [Section("By size", "", (Table(columns, rows, note=note), *pictures)), *comparison(evidence)]


CLAIMS = (
    Claim("E15", "Every method gains with size.", on_ladder(all_gain)),
    Claim("E16", "Differences between methods shrink with size.", on_ladder(differences_shrink)),
    Claim("E17", "A share of 0.008 % or less can be enough (95 % of FT), and the share falls with size.", on_ladder(little_is_enough)),
    Claim("E18", "Prompt tuning is poor on small backbones and fine on large ones (95 % of FT).", on_ladder(prompts_catch_up)),
    Claim("E18", "Selective modules are ahead of the last layer.", on_ladder(spread_out_is_better)),
)

experiments.register("scale")(Experiment("scale", "Does delta tuning gain with size, and become alike?", design, CLAIMS, sections))
