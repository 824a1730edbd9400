"""Several tasks in one trial: one delta for all, one for each, and a fusion of these; and what the experiment makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import InvalidValue
from deltatune.study.experiments import experiments
from deltatune.study.experiments.experiment import Evidence
from deltatune.study.experiments.multi_task import AP, FT, FUSED, LR, OWN, SHARED, TASKS
from deltatune.study.procedures import procedures, several, stages
from deltatune.study.trial import Trial
from deltatune.tasks import TaskData, get_task
from deltatune.training.run import Run, method_from_dict
from deltatune.training.settings import Settings
from tests.study.made_up_numbers import evidence, record
from tests.study.test_stream import NAMES, task
from tests.training import tiny


@pytest.fixture(autouse=True)
def made_up_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> TaskData:
        return task(name)

    monkeypatch.setattr(several, "load_data", load)


def trial(place: Path, deltas: str, tasks: str = ",".join(NAMES), method: str = "adapter", **settings: Any) -> Trial:
    chosen = Settings(**{"max_steps": 4, "batch_size": 8, "lr": 2e-2, "evaluations": 1, "test_rows": 16, **settings})
    run = Run(tiny.folder("llama", place), tasks, (method_from_dict({"name": method}),), settings=chosen)
    return Trial(run, method, "several", options={"deltas": deltas})


@pytest.mark.parametrize(("deltas", "trainings"), [("shared", 1), ("own", 3), ("fused", 6)])
def test_every_task_has_its_scores(deltas: str, trainings: int, tmp_path: Path) -> None:
    outcome = procedures["several"](trial(tmp_path, deltas), tmp_path / "t")
    numbers = outcome.numbers
    told = [numbers["metrics"][f"{name}.accuracy"] for name in NAMES]
    assert numbers["metric"] == "mean" and numbers["score"] == pytest.approx(sum(told) / 3) == numbers["metrics"]["mean"]
    assert numbers["steps"] == 4 * trainings
    assert all(
        low <= value <= high for value, (low, high) in zip(told, (numbers["intervals"][f"{name}.accuracy"] for name in NAMES), strict=True)
    )
    assert [entry["step"] for entry in outcome.history if "eval_score" in entry] == [4 * number for number in range(1, trainings + 1)]


def test_a_delta_for_each_is_larger_than_one_for_all(tmp_path: Path) -> None:
    sizes = {way: procedures["several"](trial(tmp_path, way), tmp_path / way).numbers["trainable_parameters"] for way in several.WAYS}
    assert sizes["own"] == 3 * sizes["shared"] and sizes["fused"] > sizes["own"]


def test_a_sample_is_drawn_once(tmp_path: Path) -> None:
    """Six of each class for training, of twelve; the sample itself has too few for another one."""
    numbers = procedures["several"](trial(tmp_path, "own", shots=6), tmp_path / "t").numbers
    assert numbers["steps"] == 12


def test_a_killed_trial_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path, "fused")
    whole = procedures["several"](asked, tmp_path / "whole")
    original, calls = stages.dt_train, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "dt_train", killed)
    with pytest.raises(KeyboardInterrupt):
        procedures["several"](asked, tmp_path / "t")
    again = procedures["several"](asked, tmp_path / "t")
    assert calls == [*(f"{name}-delta" for name in NAMES), *["fusion"] * 4]
    assert again.numbers["metrics"] == whole.numbers["metrics"]


def test_what_cannot_be_several(tmp_path: Path) -> None:
    for asked in (trial(tmp_path, "none"), trial(tmp_path, "own", tasks="bbc-news")):
        with pytest.raises(InvalidValue, match="It wants two tasks or more with commas between, one of shared, own, fused, and one method"):
            procedures["several"](asked, tmp_path / "t")


FULL = experiments["multi-task"].study("full")


def together(worth: dict[str, float], tasks: int = 8) -> Evidence:
    """One seed; a method has its worth on every task, and a little more the later the task comes."""
    found = []
    for method, value in worth.items():
        metrics = {f"{name}.{get_task(name).metric}": value + 0.01 * place for place, name in enumerate(TASKS[:tasks])}
        found.append(record(method, ",".join(TASKS), value, numbers={"metrics": metrics}))
    return evidence(FULL, found)


def test_several_tasks_are_judged() -> None:
    def verdicts(**changed: float) -> list[str]:
        worth = {FT + SHARED: 0.8, LR + SHARED: 0.79, AP + SHARED: 0.79, LR + OWN: 0.79, AP + OWN: 0.78, AP + FUSED: 0.8}
        found = together({**worth, **{method.replace("_", ", "): value for method, value in changed.items()}})
        return [claim.judge(found).verdict for claim in experiments["multi-task"].claims]

    assert verdicts() == ["holds", "holds", "holds"]
    assert verdicts(lora_shared=0.5) == ["does not hold", "does not hold", "holds"]
    assert verdicts(adapter_fused=0.6) == ["holds", "holds", "does not hold"]
    few = together({FT + SHARED: 0.8, LR + SHARED: 0.8, AP + SHARED: 0.8, LR + OWN: 0.8, AP + OWN: 0.8, AP + FUSED: 0.9}, tasks=4)
    assert [claim.judge(few).verdict for claim in experiments["multi-task"].claims] == ["undecided"] * 3
