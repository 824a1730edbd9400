"""Few examples and many seeds: what prompts gain from more of both sizes, who is steadier, and what a long prefix costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import stdev

import pytest

from deltatune.study.experiments import experiments
from deltatune.study.experiments.basis import AP, BF, FT, LR, PF, PT, SHORT
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.stability import DELTAS, LONG, RANDOM, deviations
from tests.study.made_up_numbers import evidence, record

SIZED = experiments["low-data"].study("full")
SEEDED = experiments["stability"].study("full")


def sized(few: Mapping[str, float], many: Mapping[str, float]) -> Evidence:
    """Scores with 16 examples and with 1,024."""
    found = []
    for examples, scores in ((16, few), (1024, many)):
        for place, task in enumerate(SHORT):
            for label, score in scores.items():
                found.append(record(label, task, score + 0.01 * place, cell={"train_rows": examples}))
    return evidence(SIZED, found)


def said(found: Evidence, name: str) -> list[str]:
    return [claim.judge(found).verdict for claim in experiments[name].claims]


def test_few_examples_are_judged() -> None:
    even = {FT: 0.6, LR: 0.6, AP: 0.6, BF: 0.59, PT: 0.3}
    assert said(sized(even, {FT: 0.8, PT: 0.7}), "low-data") == ["holds", "holds", "undecided"]
    assert said(sized({**even, LR: 0.5, PT: 0.5}, {FT: 0.8, PT: 0.4}), "low-data") == ["does not hold", "does not hold", "undecided"]
    assert said(sized(even, {FT: 0.85, PT: 0.5}), "low-data")[1] == "does not hold", "a larger share is not a larger gain"
    assert said(evidence(SIZED, []), "low-data") == ["undecided"] * 3


def test_a_ladder_decides_about_size() -> None:
    rungs = ("x-small", "x-base", "x-large")
    study = replace(SIZED, backbones=rungs, methods=tuple(entry for entry in SIZED.methods if not entry.backbones))
    gaps = dict(zip(rungs, (0.3, 0.2, 0.1), strict=True))
    found = [
        record(label, task, (0.8 if label == FT else 0.8 - gap) + 0.001 * place, backbone=rung, cell={"train_rows": 1024}, total=10**number)
        for number, (rung, gap) in enumerate(gaps.items(), 6)
        for place, task in enumerate(SHORT)
        for label in (FT, PT)
    ]
    assert said(evidence(study, found), "low-data")[2] == "holds"


def seeded(spread: Mapping[str, float], random: float, slower: float, bare: float = 0.3) -> Evidence:
    """Five seeds, so far apart; LoRA on random weights, so far; a prefix of 100 tokens so many times slower; and the frozen backbone."""
    found = []
    for place, task in enumerate(SHORT):
        for seed in range(5):
            off = (seed - 2) * (1 + 0.01 * place)
            for label, wide in spread.items():
                found.append(record(label, task, 0.7 + off * wide, seed=seed, seconds_per_step=0.1))
            found.append(record(LR, task, 0.4 + off * random, seed=seed, backbone=RANDOM, seconds_per_step=0.1))
            found += [record("frozen", task, bare, seed=seed, backbone=backbone) for backbone in ("minilm", RANDOM)]
            found.append(record(LONG, task, 0.7, seed=seed, seconds_per_step=0.1 * slower + 0.001 * place))
    return evidence(SEEDED, found)


def test_steadiness_is_judged() -> None:
    steady = {FT: 0.02, **dict.fromkeys(DELTAS, 0.01)}
    assert said(seeded(steady, random=0.03, slower=1.5), "stability") == ["holds", "holds", "holds"]
    wild = {FT: 0.01, **dict.fromkeys(DELTAS, 0.02)}
    assert said(seeded(wild, random=0.005, slower=0.8), "stability") == ["does not hold"] * 3
    assert said(evidence(SEEDED, []), "stability") == ["undecided"] * 3
    assert said(seeded(steady, random=0.03, slower=1.5, bare=0.5), "stability")[1] == "undecided", "random weights learnt nothing"


def test_deviations_are_of_one_backbone() -> None:
    found = seeded({FT: 0.02, LR: 0.01, PF: 0.01}, random=0.03, slower=1.0)
    assert deviations(found)[SHORT[0]][LR] == pytest.approx(stdev(0.01 * one for one in range(5)))
    assert deviations(found, RANDOM)[SHORT[0]] == {LR: pytest.approx(stdev(0.03 * one for one in range(5)))}
