"""Every experiment: its designs unfold, its claims are judged, and its sections are drawn, whatever there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from deltatune.study.design import Study, study_from_dict
from deltatune.study.experiments import experiments
from deltatune.study.experiments.combination import PARTS, SUBSETS, effects, label_of
from deltatune.study.experiments.convergence import arrivals, speeds
from deltatune.study.experiments.experiment import judged
from deltatune.study.plots.canvas import svg
from deltatune.study.plots.curves import curves_of, mean_curve
from deltatune.study.report.parts import Picture, Table
from deltatune.study.report.report import evidence_of, report_of
from deltatune.study.store.store import Store
from tests.study.made_up import TASKS, filled

NAMES = list(experiments)


def small(name: str) -> Study:
    """The full design on few tasks and seeds."""
    full = experiments[name].study("full")
    tasks = full.tasks if name in ("transfer", "multi-task") else TASKS[: min(7, len(full.tasks))]
    methods = tuple(dataclasses.replace(entry, tasks=entry.tasks and tasks[:2]) for entry in full.methods)
    fewer = {"backbones": full.backbones[:2], "tasks": tasks, "seeds": full.seeds[:2], "repeated": full.repeated and tasks[:3]}
    return dataclasses.replace(full, name="small", methods=methods, **fewer)


def test_all_are_there() -> None:
    assert NAMES == [
        "biases", "combination", "convergence", "diversity", "domain-shift", "efficiency", "forgetting", "generalization", "languages",
        "low-data", "multi-task", "performance", "prompts", "reading", "scale", "sequential", "stability", "templates", "text-to-text",
        "transfer",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment(name: str, tmp_path: Path) -> None:
    experiment = experiments[name]
    assert experiment.study("quick").profile == "quick" and experiment.study("quick").experiment == name
    assert len(list(experiment.study("quick").trials())) <= 40
    for whole in (experiment.study("quick"), experiment.study("full")):
        assert study_from_dict(json.loads(json.dumps(whole.to_dict()))) == whole  # as the store gives it back
    study = small(name)
    report = report_of(filled(tmp_path / "full.db", study), "small")
    assert [claim for claim, _ in report.verdicts] == list(experiment.claims)
    assert all(told.because for _, told in report.verdicts)
    pictures = [block for section in report.sections for block in section.blocks if isinstance(block, Picture)]
    assert pictures and len({picture.name for picture in pictures}) == len(pictures)
    assert all("<svg" in svg(picture.figure) for picture in pictures)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_that_has_not_begun(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    store.add(small(name))
    assert {told.verdict for _, told in judged(experiments[name], evidence_of(store, "small"))} == {"undecided"}
    assert report_of(store, "small").sections == []


def test_the_first_experiment_is_broad() -> None:
    """A hundred tasks and six methods, a third of the tasks at most from one battery, and twenty with three seeds."""
    study = experiments["performance"].study("full")
    tried = {(trial.task, trial.label, trial.seed) for trial in study.trials()}
    everywhere = [entry.label for entry in study.methods if all((task, entry.label, 0) in tried for task in study.tasks)]
    assert len(study.tasks) >= 100 and len(everywhere) >= 6
    assert sum(str(task).startswith(("blimp-", "bbh-")) for task in study.tasks) <= len(study.tasks) / 3
    assert sum((task, "lora", 2) in tried for task in study.tasks) >= 20


def test_a_method_on_few_tasks_leaves_the_others_compared_on_all(tmp_path: Path) -> None:
    text = json.dumps([block.note for section in report_of(filled(tmp_path / "s.db", small("performance")), "small").sections
                       for block in section.blocks if isinstance(block, Table)])  # fmt: skip
    assert "Over the 7 of 7 tasks" in text and "diff-pruning was tried on 2 tasks" in text


def test_effects_are_marginal() -> None:
    worth = {"AP": 0.2, "BF": 0.1, "PT": -0.05}
    scores = {"a": {label_of(subset): 0.5 + sum(worth[part] for part in subset) for subset in SUBSETS}}
    found = {part: table["a"]["with"] - table["a"]["without"] for part, table in effects(scores).items()}
    assert found == pytest.approx(worth)
    assert effects({"a": {"none": 0.5}}) == {"AP": {}, "BF": {}, "PT": {}}


def test_effects_beside_others() -> None:
    """Without the empty subset, a part counts by what it adds to others: three pairs each."""
    scores = {"a": {label_of(subset): 0.1 * len(subset) ** 2 for subset in SUBSETS[1:]}}
    found = {part: table["a"]["with"] - table["a"]["without"] for part, table in effects(scores, SUBSETS[1:]).items()}
    assert found == pytest.approx(dict.fromkeys(PARTS, (0.3 + 0.3 + 0.5) / 3))


def test_arrivals_are_at_the_goal(tmp_path: Path) -> None:
    evidence = evidence_of(filled(tmp_path / "s.db", small("convergence")), "small")
    found = arrivals(evidence)
    assert found.keys() == set(TASKS[:7])
    curve = curves_of([evidence.curve(record.key) for record in evidence.done if (record.task, record.method) == (TASKS[0], "full")])
    goal = 0.95 * max(score for _, score in curve)
    assert found[TASKS[0]]["full"].steps == next(step for step, score in curve if score >= goal)
    assert all(-2 <= value <= 0 for row in speeds(found).values() for value in row.values())


def test_mean_curves() -> None:
    first, second = ((10, 0.0), (100, 1.0)), ((10, 0.0), (50, 0.5))
    mean = dict(mean_curve([first, second]))
    assert min(mean) == 10 and max(mean) == 100
    assert mean[100] == pytest.approx(0.75)  # the shorter one keeps its last score
    assert mean_curve([]) == () and curves_of([]) == ()
