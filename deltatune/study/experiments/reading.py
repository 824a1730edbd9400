"""Experiment 15, third part: reading comprehension. Do deltas find the answer's words in a text as well as full fine-tuning?

Full: every set at hand whose answers are spans of a text, in English and German, MiniLM with a head for start and end, seven methods, three
seeds, 3 epochs: with the four sets of the mirror 108 trials, about 14 core-hours. Where there are fewer than six sets, a set with a seed
counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, PROBE, PT, basis
from deltatune.study.experiments.experiment import Claim, Evidence, Experiment, Judgement, experiments
from deltatune.study.experiments.judging import FEWEST, all_of, better, reaches
from deltatune.study.experiments.languages import by_pair
from deltatune.study.report.comparison import comparison
from deltatune.study.statistics import Scores
from deltatune.tasks import get_task

SPANS = ("covid-qa", "friendsqa", "xquad-en", "xquad-de", "squad", "quoref", "adversarial-qa")
SETTINGS = {"epochs": 3, "evaluations": 6, "max_length": 256, "batch_size": 8, "eval_rows": 256, "test_rows": 500}
LABELS = (FT, LR, AP, PF, PT, BF, PROBE)
CLOSE = 0.95
"""Of full fine-tuning's score."""


def at_hand() -> tuple[str, ...]:
    """The sets that can be read here; all where there are none, so that the errors say what is missing."""
    return tuple(name for name in SPANS if get_task(name).is_runnable) or SPANS


def design(profile: Profile) -> Study:
    """The methods of experiment 1 on every set; quick: one set, three methods, a few steps."""
    full = profile == "full"
    base, labels = basis(profile), LABELS if full else (FT, LR, AP)
    return replace(
        base,
        name=f"reading-{profile}",
        experiment="reading",
        tasks=at_hand() if full else at_hand()[:1],
        methods=tuple(replace(entry, settings={}) for entry in base.methods if entry.label in labels),
        settings=SETTINGS if full else {**base.settings, "max_length": 128},
        seeds=(0, 1, 2) if full else (0,),
    )


def _judged(judge: Callable[[Scores], Judgement]) -> Callable[[Evidence], Judgement]:
    """The judge of scores by set, where there are enough of them; else of scores by set and seed, and it says so."""

    def judged(evidence: Evidence) -> Judgement:
        scores = evidence.scores()
        if len(scores) >= FEWEST:
            return judge(scores)
        told = judge(by_pair(evidence))
        return Judgement(told.verdict, f"A set with a seed counts as one. {told.because}")

    return judged


CLAIMS = (
    Claim(
        "F4",
        "In reading comprehension by span, LoRA, adapter and prefix tuning each reach 95 % of full fine-tuning.",
        _judged(lambda scores: all_of([reaches(scores, method, FT, CLOSE) for method in (LR, AP, PF)])),
    ),
    Claim(
        "F4",
        "They are better than a head on the frozen backbone.",
        _judged(lambda scores: all_of([better(scores, one, PROBE) for one in (LR, AP, PF)])),
    ),
)

experiments.register("reading")(
    Experiment("reading", "Do deltas find answers in a text as well as full fine-tuning?", design, CLAIMS, comparison)
)
