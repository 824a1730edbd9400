"""Experiment 8 on made-up records: relative scores, and each judge says yes, no and that it does not know."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.transfer import FURTHER, GENERATION, NAMED, RANDOMS, RECIPES, STARTED, TYPE_OF, arrivals, by_kind, relative
from tests.study.made_up_numbers import evidence, record

FULL = experiments["transfer"].study("full")
NATIVE = 0.8
STEPS = (20, 40, 60, 80, 100, 120)


def transferred(
    own: float, other: float, chance: float = 0.5, generation: float | None = None, first: float | None = None, tasks: int = 12
) -> Evidence:
    """Relative scores within and across types and by chance; curves that reach their end at step 120, or at 20 behind another task."""
    noise, found, curves = random.Random(3), [], {}
    for number, source in enumerate(NAMED[:tasks]):
        for method in RECIPES:
            also = {}
            for target in NAMED:
                share = own if TYPE_OF[source] == TYPE_OF[target] else other
                if generation is not None and TYPE_OF[source] in GENERATION and TYPE_OF[target] == "sentiment":
                    share = generation
                also[target] = {"score": NATIVE * (share + noise.uniform(-0.01, 0.01))}
            also.pop(source)
            found.append(record(method, source, NATIVE, numbers={"also": also}))
            curves[found[-1].key] = [{"step": step, "eval_score": NATIVE * step / 120} for step in STEPS]
            found.append(record(RANDOMS[method], source, NATIVE * chance))
        for method in STARTED:
            begin = 0.0 if first is None else first
            curve = [[step, max(begin, NATIVE * step / 130)] for step in STEPS]
            stages = [{"task": source, "curve": curve}, {"task": NAMED[(number + 1) % 12], "curve": curve}]
            found.append(record(method + FURTHER, source, NATIVE, numbers={"stages": stages}))
    return replace(evidence(FULL, found), curve=lambda key: curves.get(key, ()))


def verdicts(found: Evidence) -> list[str]:
    return [claim.judge(found).verdict for claim in experiments["transfer"].claims]


def test_scores_are_relative_to_the_native_delta() -> None:
    found = relative(transferred(0.9, 0.5), "lora")
    assert len(found) == 12 * 11 + 12  # every pair, and a random delta
    assert found["glue-mnli", "snli"] == pytest.approx(0.9, abs=0.01) and found["snli", "aeslc"] == pytest.approx(0.5, abs=0.01)
    assert found["random", "snli"] == pytest.approx(0.5)
    weak = evidence(FULL, [record("lora", "snli", 0.01), record("random-delta", "snli", 0.01)])
    assert relative(weak, "lora") == {}
    assert by_kind(transferred(0.9, 0.5))["snli"] == pytest.approx({"own type": 0.9, "other types": 0.5, "random": 0.5}, abs=0.01)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (transferred(0.9, 0.5, generation=0.95, first=0.79), ["holds", "holds", "holds", "holds"]),
        (transferred(0.4, 0.7, first=0.0), ["does not hold", "does not hold", "does not hold", "does not hold"]),
        (transferred(0.9, 0.5, tasks=4), ["undecided"] * 4),
    ],
)
def test_transfer_is_judged(found: Evidence, said: list[str]) -> None:
    assert verdicts(found) == said


def test_it_takes_so_many_steps() -> None:
    found = arrivals(transferred(0.9, 0.5, first=0.79))
    assert len(found) == 12 and "glue-sst2 -> yelp-labelled-sentences" in found and "meqsum -> glue-sst2" in found
    assert found["meqsum -> glue-sst2"] == pytest.approx({"from scratch": -1.0, "behind another task": -1 / 6})
    assert arrivals(transferred(0.9, 0.5, first=0.0))["meqsum -> glue-sst2"]["behind another task"] == -2.0


def test_the_full_design() -> None:
    trials = list(FULL.trials())
    assert len(trials) == 12 * (4 + 3 + 2 + 2)
    assert {TYPE_OF[task] for task in NAMED} == {"sentiment", "inference", "paraphrase", "question answering", "summarization"}
