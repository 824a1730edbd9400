"""Experiment 1, first part: how well does each method do over all tasks, beside full fine-tuning and the baselines, and what does it train?

All tables of this part are of the head form, on an encoder; the second part, ``text-to-text``, has the answers in words, on a decoder.
"""

from __future__ import annotations

from deltatune.methods import Adapter, BitFit, DiffPruning, FullFineTuning, LastLayers, LinearProbe, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.kinds import Method, methods
from deltatune.study.design import Entry, Profile, Study
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import all_of, better, lacking, level, ordered, reaches
from deltatune.study.report.comparison import comparison
from deltatune.study.statistics import complete, over_tasks
from deltatune.tasks import get_task, tasks

FT, LR, AP, PF, PT, BF = "full", "lora", "adapter", "prefix-tuning", "prompt-tuning", "bitfit"
DIFF, LAST, PROBE = "diff-pruning", "last-layers", "linear-probe"
BATTERIES = ("blimp-", "bbh-")
"""Tasks that come in dozens from one source; at most a third of all may be theirs."""

LONG = ("prefix-tuning", "prompt-tuning")
"""Methods that take their time: they get more epochs before their own plateau ends them."""

QUICK = {"max_steps": 20, "batch_size": 8, "max_length": 32, "evaluations": 2, "eval_rows": 64, "test_rows": 128}
FULL = {"epochs": 12, "evaluations": 24, "early_stopping": 6, "max_length": 64}
"""Validation twice an epoch, stopped after three epochs without a better score."""


def _entry(method: Method, profile: Profile) -> Entry:
    label = methods.name_of(type(method))
    longer = {"epochs": 40, "evaluations": 80} if profile == "full" and label in LONG else {}
    return Entry(label, (method,), settings=longer)


def design(profile: Profile) -> Study:
    """Quick: four tasks and six methods, a few steps each. Full: every task at hand that a head fits, nine methods."""
    recipes: tuple[Method, ...] = (FullFineTuning(), LoRA(), Adapter(), PrefixTuning(), PromptTuning(), BitFit(), LinearProbe())
    if profile == "full":
        recipes = (*recipes, DiffPruning(), LastLayers())
    return Study(
        name=f"performance-{profile}",
        experiment="performance",
        profile=profile,
        backbones=("minilm",),
        tasks=tuple(suitable() if profile == "full" else ("bbc-news", "tweet-sentiment")),
        methods=tuple(_entry(recipe, profile) for recipe in recipes),
        settings=FULL if profile == "full" else QUICK,
        seeds=(0,),
    )


def suitable() -> list[str]:
    """The tasks at hand that a head fits; of batteries at most half as many as of the others."""
    here = [task for task in map(get_task, tasks) if task.is_runnable and task.outputs]
    single = [task.name for task in here if not task.name.startswith(BATTERIES)]
    return single + [task.name for task in here if task.name.startswith(BATTERIES)][: len(single) // 2]


def count_does_not_rule(evidence: Evidence) -> Judgement:
    """The method that trains most of the deltas is not the best, and counts do not order scores."""
    own = [label for label in evidence.methods if label in (LR, AP, PF, PT, BF)]
    if (found := lacking(evidence.scores(), own)) is not None or len(own) < 4:
        return found or Judgement("undecided", f"Only {', '.join(own)} have scores; four deltas are needed.")
    scores = complete(evidence.scores(), own)
    means = {label: over_tasks(scores, label).value for label in own}
    counts = {label: next(record.trained or 0 for record in evidence.done if record.method == label) for label in own}
    most, best = max(counts, key=counts.__getitem__), max(means, key=means.__getitem__)
    said = ", ".join(f"{label} {counts[label]:,} -> {means[label]:.3f}" for label in sorted(own, key=counts.__getitem__))
    return Judgement("does not hold" if most == best else "holds", f"{said}. {most} trains most, {best} is best.")


def deltas_beat_full(evidence: Evidence) -> Judgement:
    """Each of the three close methods is better than full fine-tuning on a tenth of the tasks or more."""
    if (found := lacking(evidence.scores(), (FT, LR, AP, PF))) is not None:
        return found
    scores = complete(evidence.scores(), (FT, LR, AP, PF))
    shares = {method: sum(row[method] > row[FT] for row in scores.values()) / len(scores) for method in (LR, AP, PF)}
    said = ", ".join(f"{method} on {share:.0%}" for method, share in shares.items())
    return Judgement("holds" if min(shares.values()) >= 0.1 else "does not hold", f"Better than {FT}: {said} of {len(scores)} tasks.")


CLAIMS = (
    Claim("E2", "The ranking is FT > LoRA > adapter > prefix > prompt.", lambda evidence: ordered(evidence.scores(), (FT, LR, AP, PF, PT))),
    Claim(
        "E2",
        "LoRA, adapter and prefix tuning are close to each other (within 0.03).",
        lambda evidence: all_of(
            [level(evidence.scores(), LR, AP, 0.03), level(evidence.scores(), LR, PF, 0.03), level(evidence.scores(), AP, PF, 0.03)]
        ),
    ),
    Claim("E2", "Each of these three is sometimes better than FT (on a tenth of the tasks or more).", deltas_beat_full),
    Claim("E3", "Quality is not tied to how many parameters train: structure matters.", count_does_not_rule),
    Claim("E23", "BitFit reaches 95 % of FT.", lambda evidence: reaches(evidence.scores(), BF, FT, 0.95)),
    Claim("E23", "BitFit is better than a frozen backbone with a trained head.", lambda evidence: better(evidence.scores(), BF, PROBE)),
    Claim("E23", "BitFit is level with diff pruning (within 0.03).", lambda evidence: level(evidence.scores(), BF, DIFF, 0.03)),
    Claim(
        "C6",
        "Training the last quarter of the layers reaches about 90 % of FT (at least 88 %).",
        lambda evidence: reaches(evidence.scores(), LAST, FT, 0.88),
    ),
    Claim("E25", "LoRA matches FT (at least 97 %) on an encoder.", lambda evidence: reaches(evidence.scores(), LR, FT, 0.97)),
)

experiments.register("performance")(
    Experiment("performance", "How well does each method do over all tasks, and how much does it train?", design, CLAIMS, comparison)
)
