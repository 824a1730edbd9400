"""Experiment 7: controls decide nothing, a trained ladder does, each way."""

from __future__ import annotations

import dataclasses

import pytest

from deltatune.study.experiments import experiments
from deltatune.study.experiments import scale as own
from deltatune.study.experiments.basis import FT, LR, PT
from deltatune.study.experiments.experiment import Evidence, Verdict
from deltatune.study.record import Record

FULL = experiments["scale"].study("full")
T5 = ("t5-small", "t5-base", "t5-large")
GOOD = {FT: 0.9, **dict.fromkeys(own.METHODS, 0.88)}


def evidence(backbones: tuple[str, ...], *scores: dict[str, float], share: float = 0.01, seeds: int = 2) -> Evidence:
    """Scores by method of each backbone, a little apart from task to task; every delta trains the same share."""
    records = [
        Record(
            f"{backbone}{task}{method}{seed}", backbone, task, "nli", method, seed,
            score=score + at / 500 + seed / 1000, total=10**6 * (rung + 1), trained=round(share * 10**6 * (rung + 1)),
        )
        for rung, (backbone, row) in enumerate(zip(backbones, scores, strict=True))
        for at, task in enumerate(own.TASKS)
        for seed in range(seeds)
        for method, score in row.items()
    ]  # fmt: skip
    return Evidence(dataclasses.replace(FULL, backbones=backbones), records)


def lower(**scores: float) -> dict[str, float]:
    """Low scores of all, but for those named (dashes as underscores)."""
    return {FT: 0.7, **dict.fromkeys(own.METHODS, 0.6), **{name.replace("_", "-"): score for name, score in scores.items()}}


@pytest.mark.parametrize(
    "backbones",
    [("minilm@layers=1", "minilm@layers=3", "minilm"), ("minilm", "smollm2-135m", "t5-base"), ("t5-small", "t5-base", "t5-large@random")],
)
def test_controls_are_no_ladder(backbones: tuple[str, ...]) -> None:
    found = evidence(backbones, lower(), lower(), GOOD)
    told = [claim.judge(found) for claim in experiments["scale"].claims]
    assert {one.verdict for one in told} == {"undecided"}
    assert all("3 sizes of one pretrained family" in one.because and backbones[0] in one.because for one in told)


def test_a_ladder_is_ordered_by_size() -> None:
    assert own.ladder(evidence(T5, GOOD, GOOD, GOOD)) == list(T5)
    assert own.ladder(evidence(T5[:2], GOOD, GOOD)) == []


def verdict_of(number: str, found: Evidence, which: int = 0) -> Verdict:
    return [claim for claim in experiments["scale"].claims if claim.number == number][which].judge(found).verdict


def test_gains() -> None:
    assert verdict_of("E15", evidence(T5, lower(), lower(), GOOD)) == "holds"
    assert verdict_of("E15", evidence(T5, GOOD, lower(), lower())) == "does not hold"
    assert verdict_of("E15", evidence(T5, lower(), lower(), GOOD, seeds=1)) == "undecided"  # three scores of a method tell nothing


def test_differences() -> None:
    apart = lower(**{LR: 0.9})
    assert verdict_of("E16", evidence(T5, apart, apart, GOOD)) == "holds"
    assert verdict_of("E16", evidence(T5, GOOD, apart, apart)) == "does not hold"


def test_little() -> None:
    assert verdict_of("E17", evidence(T5, lower(), lower(), GOOD, share=0.00005)) == "holds"  # on the smallest, nothing reaches it
    assert verdict_of("E17", evidence(T5, lower(), lower(), GOOD, share=0.01)) == "does not hold"
    assert verdict_of("E17", evidence(T5, GOOD, GOOD, GOOD, share=0.00005)) == "does not hold"  # the share does not fall
    assert verdict_of("E17", evidence(T5, GOOD, GOOD, {FT: 0.9})) == "undecided"


def test_prompts() -> None:
    poor = {**GOOD, PT: 0.6}
    assert verdict_of("E18", evidence(T5, poor, poor, GOOD)) == "holds"
    assert verdict_of("E18", evidence(T5, poor, poor, poor)) == "does not hold"
    assert verdict_of("E18", evidence(T5, GOOD, GOOD, GOOD)) == "does not hold"


def test_selective_modules() -> None:
    ahead = {**GOOD, own.SM: 0.89, own.LL: 0.85}
    assert verdict_of("E18", evidence(T5, GOOD, GOOD, ahead), 1) == "holds"
    assert verdict_of("E18", evidence(T5, ahead, ahead, {**GOOD, own.SM: 0.8}), 1) == "does not hold"
    assert verdict_of("E18", evidence(T5, GOOD, GOOD, GOOD), 1) == "undecided"


def test_the_least_share() -> None:
    found = evidence(("minilm",), {FT: 0.9, LR: 0.88, PT: 0.5}, share=0.003)
    assert own.least_share(found, "minilm") == (0.003, LR)
    assert own.least_share(evidence(("minilm",), {FT: 0.9, LR: 0.6}), "minilm") is None
