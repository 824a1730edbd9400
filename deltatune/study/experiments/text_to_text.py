"""Experiment 1, second part: the same question text to text, answers in words, on a decoder.

Full: thirteen tasks of twelve categories on SmolLM2-135M, five of which are written: a bAbI question, subjects of mails, restaurants from
their data, captions in German, Shakespeare's English. Seven methods, 64 rows in up to six epochs, prompts and prefixes in up to twelve: 91
trials and two baselines each, about seven core-hours. Label words are scored, other answers are generated. A head that is trained alone
has no place here, so that BitFit is held against the frozen backbone.
"""

from __future__ import annotations

from dataclasses import replace

from deltatune.study.design import Profile, Study
from deltatune.study.experiments.basis import BF, DIFF, FT, LONG, LR, PROBE, basis
from deltatune.study.experiments.experiment import Claim, Experiment, experiments
from deltatune.study.experiments.generalization import DECODER
from deltatune.study.experiments.judging import better, reaches
from deltatune.study.experiments.performance import CLAIMS as IN_THE_HEAD_FORM
from deltatune.study.report.comparison import comparison

TASKS = (
    "glue-sst2", "ag-news", "trec-coarse", "emotion", "snli", "glue-mrpc", "glue-cola", "subj",
    "babi-qa1", "aeslc", "rnnlg-restaurant", "multi30k-en-de", "shakespeare-style",
)  # fmt: skip
"""The last five are written."""

SETTINGS = {
    "framing": "text2text", "batch_size": 8, "max_length": 96, "train_rows": 64, "eval_rows": 32, "test_rows": 100, "eval_batch_size": 32,
    "epochs": 6, "evaluations": 6, "early_stopping": 3,
}  # fmt: skip
LONGER = {"epochs": 12, "evaluations": 12, "early_stopping": 4}


def design(profile: Profile) -> Study:
    """The methods of the head form but for probe and diff pruning; quick: one task that is scored and one written, two methods."""
    full = profile == "full"
    base = basis(profile)
    chosen = [entry for entry in base.methods if entry.label not in (PROBE, DIFF) and (full or entry.label in (LR, BF))]
    methods = [replace(entry, settings=LONGER if full and entry.label in LONG else {}) for entry in chosen]
    short = {**SETTINGS, "max_steps": 3, "evaluations": 1, "early_stopping": None, "eval_rows": 8, "test_rows": 16}
    return replace(
        base,
        name=f"text-to-text-{profile}",
        experiment="text-to-text",
        backbones=(DECODER,),
        tasks=TASKS if full else (TASKS[0], TASKS[8]),
        methods=tuple(methods),
        settings=SETTINGS if full else short,
    )


SHARED = tuple(claim for claim in IN_THE_HEAD_FORM if claim.number in ("E2", "E3", "C6"))
"""Judged the same in both forms."""

CLAIMS = (
    *SHARED,
    Claim("E23", "BitFit reaches 95 % of FT.", lambda evidence: reaches(evidence.scores(), BF, FT, 0.95)),
    Claim("E23", "BitFit is better than the frozen backbone.", lambda evidence: better(evidence.scores(), BF, "frozen")),
    Claim("E25", "LoRA matches FT (at least 97 %) on a decoder.", lambda evidence: reaches(evidence.scores(), LR, FT, 0.97)),
)

experiments.register("text-to-text")(
    Experiment("text-to-text", "How well does each method do when answers are words, some of them written?", design, CLAIMS, comparison)
)
