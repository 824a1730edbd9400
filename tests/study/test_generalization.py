"""Experiments 6 and 13 on made-up records: each judge says yes, no and that it does not know."""

from __future__ import annotations

import random

import pytest

from deltatune.study.experiments import experiments
from deltatune.study.experiments.domain_shift import AP, BF, FT, LR, PF, away, drops
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.generalization import BARE, DECODER, LABELS, TASKS, fits, halves
from tests.study.made_up_numbers import evidence, record

FULL = experiments["generalization"].study("full")
AS_CLAIMED = {"full": 0.20, "AP": 0.10, "BF": 0.08, "PT": 0.02, "AP+BF": 0.15, "AP+PT": 0.14, "BF+PT": 0.12, "AP+BF+PT": 0.195}


def gapped(gaps: dict[str, float], bare: float = 0.0, tasks: int = 8, train: float = 0.95) -> Evidence:
    """Trials whose gaps are those, a little more or less, on both backbones."""
    noise, found = random.Random(1), []
    for task in TASKS[:tasks]:
        for label, gap in gaps.items():
            for backbone, ending, more in (("minilm", "", 0.0), (DECODER, "", 0.0), (DECODER, BARE, bare)):
                own = gap + more + noise.uniform(-0.004, 0.004)
                numbers = {"also": {"train": {"metric": "accuracy", "score": train, "rows": 100}}}
                found.append(record(label + ending, task, train - own, backbone=backbone, numbers=numbers))
    return evidence(FULL, found)


def verdicts(found: Evidence, name: str) -> list[str]:
    return [claim.judge(found).verdict for claim in experiments[name].claims]


def test_the_full_design_has_both_halves() -> None:
    trials = list(FULL.trials())
    own = [trial for trial in trials if trial.label.removesuffix(BARE) in LABELS]
    assert len(own) == 6 * 8 * 3
    assert all(trial.backbone == DECODER and not trial.run.settings.manual_template for trial in own if trial.label.endswith(BARE))


def test_gaps_are_what_training_rows_have_more() -> None:
    found = gapped(AS_CLAIMED)
    names = dict(halves(found))
    assert list(names) == ["minilm", DECODER, DECODER + BARE]
    trained, gaps = fits(names[DECODER + BARE])
    assert gaps["subj"]["full"] == pytest.approx(0.2, abs=0.004) and trained["subj"]["full"] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        (AS_CLAIMED, ["holds", "holds", "holds", "holds", "holds", "holds"]),
        ({label: 0.3 - gap for label, gap in AS_CLAIMED.items()}, ["does not hold"] * 3 + ["holds"] * 3),
        (dict.fromkeys(AS_CLAIMED, 0.1), ["undecided"] * 3 + ["holds"] * 3),
    ],
)
def test_gaps_are_judged(gaps: dict[str, float], said: list[str]) -> None:
    assert verdicts(gapped(gaps), "generalization") == said


def test_the_other_claims_can_be_wrong() -> None:
    assert verdicts(gapped(AS_CLAIMED, bare=0.1), "generalization")[4] == "does not hold"
    assert verdicts(gapped({**AS_CLAIMED, "AP+BF+PT": 0.1}), "generalization")[3] == "does not hold"
    weak = []
    for one in gapped(AS_CLAIMED).records:
        numbers = {"also": {"train": {"score": 1.0 if one.method == "full" else 0.6}}}
        weak.append(record(one.method, one.task, 0.5, backbone=one.backbone, numbers=numbers))
    assert verdicts(evidence(FULL, weak), "generalization")[5] == "does not hold"
    assert set(verdicts(gapped(AS_CLAIMED, tasks=3), "generalization")) == {"undecided"}


def shifted(away_from_full: float, home: float = 0.0) -> Evidence:
    """Deltas that are so much better than full fine-tuning on other sets, and at home."""
    study, noise, found = experiments["domain-shift"].study("full"), random.Random(2), []
    sets = {"snli": 6, "tweet-sentiment": 4, "glue-sst2": 2}
    for source, count in sets.items():
        for method in (FT, LR, AP, PF, BF):
            more = 0.0 if method == FT else 1.0
            also = {f"set {n}": {"score": 0.6 + more * away_from_full + noise.uniform(-0.01, 0.01)} for n in range(count)}
            found.append(record(method, source, 0.8 + more * home, numbers={"also": also}))
    return evidence(study, found)


def test_domain_shift_is_judged() -> None:
    assert verdicts(shifted(0.05), "domain-shift") == ["holds", "holds"]
    assert verdicts(shifted(-0.05), "domain-shift") == ["does not hold", "does not hold"]
    assert verdicts(shifted(0.05, home=0.05), "domain-shift") == ["holds", "undecided"]
    assert verdicts(shifted(0.0), "domain-shift") == ["undecided", "undecided"]
    assert away(shifted(0.05)).keys() == drops(shifted(0.05)).keys() and len(away(shifted(0.05))) == 12
