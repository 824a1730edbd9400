"""Experiment 9: its claims are judged each way."""

from __future__ import annotations

from typing import Any

import pytest

from deltatune.study.experiments import experiments
from deltatune.study.experiments import prompts as own
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.record import Record
from tests.study.made_up import TASKS

FULL = experiments["prompts"].study("full")


def evidence(scores: dict[str, float], tasks: int = 7, numbers: dict[str, dict[str, Any]] | None = None, **fields: Any) -> Evidence:
    """Scores by label, a little apart from task to task."""
    return Evidence(
        FULL,
        [
            Record(
                f"{task}{label}",
                "smollm2-135m",
                task,
                "c",
                label,
                0,
                score=score + number / 500,
                numbers=(numbers or {}).get(label, {}),
                **fields,
            )
            for number, task in enumerate(TASKS[:tasks])
            for label, score in scores.items()
        ],
    )


def grid(**starts: float) -> dict[str, float]:
    return {own.label_of(start, length): score for start, score in starts.items() for length in own.LENGTHS}


def test_starts() -> None:
    assert own.starts_matter(evidence(grid(labels=0.8, vocabulary=0.75, random=0.7))).verdict == "holds"
    assert own.starts_matter(evidence(grid(labels=0.7, vocabulary=0.75, random=0.8))).verdict == "does not hold"
    assert own.starts_matter(evidence(grid(labels=0.8, vocabulary=0.75))).verdict == "undecided"


@pytest.mark.parametrize(("long", "verdict"), [(0.755, "holds"), (0.85, "does not hold")])
def test_length(long: float, verdict: str) -> None:
    scores = {own.label_of("vocabulary", 20): 0.75, own.label_of("vocabulary", 100): long}
    assert own.length_saturates(evidence(scores)).verdict == verdict
    assert own.length_saturates(evidence(scores, tasks=3)).verdict == "undecided"


def ensembles(routed: float, tasks: int = 7, size: int = 1000) -> Evidence:
    told = {"singles": [0.6, 0.7], "mean": 0.65, "best": 0.7, "averaged": 0.7, "rounds": [[9.0, 1.0], [routed, 1.0]]}
    return evidence({own.ENSEMBLE: 0.72}, tasks, {own.ENSEMBLE: {"ensemble": told}}, delta_bytes=size, total=1_000_000)


def test_ensembles() -> None:
    assert own.votes(ensembles(0.9))[TASKS[0]] == {"vote": 0.72, "mean": 0.65, "best": 0.7}
    assert own.routing_is_cheap(ensembles(0.9)).verdict == "holds"  # the first batch warms up
    assert own.routing_is_cheap(ensembles(1.5)).verdict == "does not hold"
    assert own.routing_is_cheap(ensembles(0.9, size=800_000)).verdict == "does not hold"
    assert own.routing_is_cheap(ensembles(0.9, tasks=3)).verdict == "undecided"


def worded(zero_shot: float, tuned: float) -> Evidence:
    """Differences between the best and the worst wording."""

    def told(spread: float) -> dict[str, Any]:
        scores = {"own": 0.6, "other": 0.1, "a -> b": 0.6 - spread}
        return {"templates": [{"change": change, "prompt": "", "score": score} for change, score in scores.items()]}

    return evidence({own.ZERO_SHOT: 0.6, own.TUNED: 0.8}, numbers={own.ZERO_SHOT: told(zero_shot), own.TUNED: told(tuned)})


def test_templates() -> None:
    assert own.templates_are_fragile(worded(0.2, 0.1)).verdict == "holds"
    assert own.templates_are_fragile(worded(0.02, 0.1)).verdict == "does not hold"
    assert own.tuning_steadies(worded(0.2, 0.1)).verdict == "holds"
    assert own.tuning_steadies(worded(0.1, 0.2)).verdict == "does not hold"
    assert own.tuning_steadies(evidence({own.ZERO_SHOT: 0.6})).verdict == "undecided"
