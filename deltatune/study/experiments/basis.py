"""What the experiments share: names of methods, how long the two profiles train, and the design that most of them vary.

``full`` trains until the validation score stops rising, on a sample of each task's rows that fits two cores (decision 16).
"""

from __future__ import annotations

from typing import Any

from deltatune.methods import Adapter, BitFit, DiffPruning, FullFineTuning, LastLayers, LinearProbe, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.kinds import Method, methods
from deltatune.study.design import Entry, Profile, Study

FT, LR, AP, PF, PT, BF = "full", "lora", "adapter", "prefix-tuning", "prompt-tuning", "bitfit"
DIFF, LAST, PROBE = "diff-pruning", "last-layers", "linear-probe"

SHORT = ("glue-sst2", "glue-cola", "tweet-sentiment", "subj", "emotion", "snli", "clickbait", "sms-spam")
"""Tasks of several kinds whose texts are short and whose classes have many rows, for experiments that repeat each trial often."""

QUICK: dict[str, Any] = {"max_steps": 20, "batch_size": 8, "max_length": 32, "evaluations": 2, "eval_rows": 64, "test_rows": 128}

SAMPLE: dict[str, Any] = {"batch_size": 8, "max_length": 64, "train_rows": 128, "eval_rows": 96, "test_rows": 240}
"""The rows of a task that ``full`` trains on and scores."""

FULL: dict[str, Any] = {**SAMPLE, "epochs": 12, "evaluations": 12, "early_stopping": 4}
"""Validation once an epoch, stopped after four epochs without a better score."""

LONGER: dict[str, Any] = {"epochs": 24, "evaluations": 24, "early_stopping": 6}
PROMPT = PromptTuning(num_virtual_tokens=20)
"""Its default of 100 tokens would make rows of 25 tokens five times as long."""

LONG = (PF, PT)
"""Methods that take their time: they get more epochs before their own plateau ends them."""


def basis(profile: Profile) -> Study:
    """MiniLM with a head on two tasks: quick with seven methods for a few steps, full with nine until they stop getting better."""
    recipes: tuple[Method, ...] = (FullFineTuning(), LoRA(), Adapter(), PrefixTuning(), PROMPT, BitFit(), LinearProbe())
    if profile == "full":
        recipes = (*recipes, DiffPruning(), LastLayers())
    return Study(
        name=f"performance-{profile}",
        experiment="performance",
        profile=profile,
        backbones=("minilm",),
        tasks=("bbc-news", "tweet-sentiment"),
        methods=tuple(_entry(recipe, profile) for recipe in recipes),
        settings=FULL if profile == "full" else QUICK,
        seeds=(0,),
    )


def _entry(method: Method, profile: Profile) -> Entry:
    label = methods.name_of(type(method))
    return Entry(label, (method,), settings=LONGER if profile == "full" and label in LONG else {})
