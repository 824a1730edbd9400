"""Stages: each trains its own delta behind frozen ones; a trial that is killed between two goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.sequential import BARE, ORDERS, additions
from deltatune.study.procedures import procedures
from deltatune.study.procedures import stages as module
from deltatune.study.trial import Trial
from deltatune.training.run import DataFile, Run, method_from_dict
from deltatune.training.settings import Settings
from tests.cli.conftest import write_texts
from tests.study.made_up_numbers import evidence, record
from tests.training.tiny import folder

RECIPES: list[dict[str, Any]] = [{"name": "adapter", "bottleneck_dim": 3}, {"name": "bitfit"}, {"name": "lora", "rank": 2}]


def trial(place: Path, backbone: str = "bert") -> Trial:
    data = DataFile(str(write_texts(place / "headlines.csv", 90)), text="headline", label="topic")
    settings = Settings(max_steps=4, batch_size=8, lr=5e-3, evaluations=2)
    return Trial(Run(folder(backbone, place), data, tuple(map(method_from_dict, RECIPES)), settings=settings), "all", "stages")


def test_each_stage_trains_its_own_delta(tmp_path: Path) -> None:
    outcome = procedures["stages"](trial(tmp_path), tmp_path / "t")
    told = outcome.numbers["stages"]
    assert [one["method"] for one in told] == ["adapter", "bitfit", "lora"]
    assert outcome.numbers["score"] == told[-1]["score"] and outcome.numbers["steps"] == 12
    assert all(one["steps"] == 4 and one["validation"] is not None for one in told)
    assert [(entry["stage"], entry["step"]) for entry in outcome.history if "eval_score" in entry] == [
        (1, 2), (1, 4), (2, 6), (2, 8), (3, 10), (3, 12)
    ]  # fmt: skip
    model, _, first = dt.open(tmp_path / "t" / "stage-1" / "delta")
    later = [dt.load(model, tmp_path / "t" / f"stage-{number}" / "delta") for number in (2, 3)]
    sizes = [delta.budget().delta for delta in (first, *later)]
    assert outcome.numbers["trainable_parameters"] == sum(sizes) and len(set(sizes)) == 3


def test_a_killed_trial_goes_on_behind_its_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path)
    whole = procedures["stages"](asked, tmp_path / "whole")
    original, calls = module.dt_train, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "dt_train", killed)
    with pytest.raises(KeyboardInterrupt):
        procedures["stages"](asked, tmp_path / "t")
    again = procedures["stages"](asked, tmp_path / "t")
    assert calls == ["stage-1", "stage-2", "stage-3", "stage-3"]
    assert again.numbers["stages"] == whole.numbers["stages"]
    assert [(one["step"], one.get("loss"), one.get("eval_score")) for one in again.history] == [
        (one["step"], one.get("loss"), one.get("eval_score")) for one in whole.history
    ]
    for number in (1, 2, 3):
        _, _, one = dt.open(tmp_path / "t" / f"stage-{number}" / "delta")
        _, _, other = dt.open(tmp_path / "whole" / f"stage-{number}" / "delta")
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


FULL = experiments["sequential"].study("full")
AHEAD = {"AP > BF > PT": (0.80, 0.85, 0.90)}


def staged(scores: dict[str, tuple[float, ...]], otherwise: tuple[float, ...], seeds: int = 6) -> Evidence:
    """Scores by stage of some orders and of all others."""
    found = []
    for seed in range(seeds):
        for order in ORDERS:
            for ending in ("", BARE):
                own = [score + 0.001 * seed for score in scores.get(order, otherwise)]
                numbers = {"stages": [{"score": score} for score in own]}
                found.append(record(order + ending, "glue-sst2", own[-1], seed=seed, numbers=numbers))
    return evidence(FULL, found)


def verdicts(found: Evidence) -> list[str]:
    return [claim.judge(found).verdict for claim in experiments["sequential"].claims]


def test_orders_are_judged() -> None:
    assert verdicts(staged({}, (0.80, 0.85, 0.90))) == ["holds", "holds"]
    assert verdicts(staged(AHEAD, (0.88, 0.87, 0.86))) == ["undecided", "does not hold"]
    assert verdicts(staged({}, (0.88, 0.87, 0.86))) == ["does not hold", "holds"]
    assert verdicts(staged({}, (0.80, 0.85, 0.90), seeds=0)) == ["undecided", "undecided"]
    found = additions(staged({}, (0.80, 0.85, 0.90)))
    assert {part: len(own) for part, own in found.items()} == {"AP": 48, "BF": 48, "PT": 48}
    assert all(row["after"] - row["before"] == pytest.approx(0.05) for own in found.values() for row in own.values())


def test_the_full_design_has_all_orders() -> None:
    own = [one for one in FULL.trials() if one.procedure == "stages"]
    assert len(own) == 60 and {one.run.settings.manual_template for one in own} == {True, False}
    assert len(set(ORDERS)) == 6
