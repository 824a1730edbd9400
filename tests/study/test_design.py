"""Designs: strict YAML in, the same YAML out, every mistake named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltatune.errors import DeltaError, InvalidValue, UnknownName
from deltatune.study.design import read_study, study_from_dict
from deltatune.study.trial import trial_from_dict
from tests.study.made_up import design

WHOLE: dict[str, Any] = {
    "name": "whole",
    "backbones": ["minilm"],
    "tasks": ["bbc-news", {"path": "mail.csv", "label": "box"}],
    "methods": [
        "bitfit",
        {"name": "lora", "rank": 4},
        {"label": "top", "method": {"name": "lora", "rank": 2}, "where": ["attention.*"], "layers": "top:2", "settings": {"lr": 1e-3}},
        {"label": "both", "method": ["ia3", {"name": "lora", "rank": 8}]},
    ],
    "settings": {"max_steps": 10},
    "grid": {"shots": [16, None], "manual_template": [True, False]},
    "seeds": [13, 21],
    "rates": {"trials": 5, "tasks": ["bbc-news"]},
    "time_limit": 600,
}


def test_a_study_is_its_yaml(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(WHOLE, sort_keys=False))
    study = read_study(file)
    assert study_from_dict(study.to_dict()) == study
    assert [entry.label for entry in study.entries] == ["bitfit", "lora", "top", "both", "frozen", "random-delta"]
    trials = list(study.trials())
    assert len(trials) == len({trial.key for trial in trials}) == 2 * 2 * 4 * 6
    assert all(trial_from_dict(trial.to_dict()) == trial for trial in trials)
    assert trials[2].said == "top on bbc-news, minilm, shots 16, manual_template True, seed 13"
    assert trials[2].run.settings.lr == 1e-3 and trials[2].run.settings.shots == 16


def test_a_method_for_some_backbones() -> None:
    worded = {"label": "bare", "method": "lora", "settings": {"manual_template": False}, "backbones": "smollm2-135m"}
    study = design(tasks=["bbc-news"], backbones=["minilm", "smollm2-135m"], methods=["lora", worded])
    assert study_from_dict(study.to_dict()) == study
    tried = {(trial.backbone, trial.label) for trial in study.trials()}
    assert ("smollm2-135m", "bare") in tried and ("minilm", "bare") not in tried and len(tried) == 7
    with pytest.raises(InvalidValue, match="is for `smollm2-135m`, but its backbones are minilm"):
        design(methods=[worded])


def test_a_method_for_some_tasks() -> None:
    dear = {"label": "dear", "method": "diff-pruning", "tasks": "subj"}
    study = design(tasks=["bbc-news", "subj"], methods=["lora", dear], baselines=False)
    assert study_from_dict(study.to_dict()) == study
    assert [(trial.task, trial.label) for trial in study.trials()] == [("bbc-news", "lora"), ("subj", "lora"), ("subj", "dear")]
    with pytest.raises(InvalidValue, match="is for `ag-news`, but its tasks are bbc-news, subj"):
        design(tasks=["bbc-news", "subj"], methods=[{**dear, "tasks": ["ag-news"]}])
    with pytest.raises(InvalidValue, match="asks for one trial twice: as `lora on subj"):
        design(tasks=["bbc-news", "subj"], methods=["lora", {"label": "again", "method": "lora", "tasks": ["subj"]}])


def test_a_setting_that_came_later_changes_keys_where_it_changes_something() -> None:
    """The key of the first trial is as it was before there was `train_rows`."""
    keys = [[trial.key for trial in design(settings=settings).trials()] for settings in ({}, {"train_rows": 0}, {"train_rows": 9})]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])
    [first, *_] = design().trials()
    run = {name: value for name, value in first.run.to_dict().items() if name not in ("versions", "fingerprint")}
    del run["settings"]["train_rows"]
    content = json.dumps([first.procedure, dict(first.options), run], sort_keys=True, default=str)
    assert first.key == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_some_tasks_see_every_seed() -> None:
    study = design(tasks=["bbc-news", "subj"], methods=["lora"], baselines=False, seeds=[4, 5, 6], repeated=["subj"])
    assert study_from_dict(study.to_dict()) == study
    assert [(trial.task, trial.seed) for trial in study.trials()] == [("bbc-news", 4), ("subj", 4), ("subj", 5), ("subj", 6)]
    with pytest.raises(InvalidValue, match="repeats `ag-news`, which is not among its tasks"):
        design(tasks=["bbc-news"], repeated=["ag-news"])


def test_keys_are_of_the_content_alone() -> None:
    first, second = design(), design(name="other", methods=["bitfit", {"label": "mine", "method": "lora"}], seeds=[0, 1])
    keys = {trial.said: trial.key for trial in first.trials()}
    others = {trial.said: trial.key for trial in second.trials()}
    assert keys["lora on bbc-news, minilm, seed 0"] == others["mine on bbc-news, minilm, seed 0"]
    assert others["mine on bbc-news, minilm, seed 0"] != others["mine on bbc-news, minilm, seed 1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": ["bbc-news"]}, "the entry `task`, which does not belong there. Did you mean `tasks`"),
        ({"tasks": ["bcb-news"]}, "No task is called `bcb-news`. Did you mean `bbc-news`"),
        ({"methods": ["lroa"]}, "No method is called `lroa`. Did you mean `lora`"),
        ({"methods": [{"name": "lora", "rnk": 4}]}, "no field called `rnk`"),
        ({"methods": [{"method": "lora", "lable": "x"}]}, "Method 1 of the study has the entry `lable`"),
        ({"methods": ["lora", {"name": "lora", "rank": 4}]}, "has `lora` twice among its methods"),
        ({"methods": ["lora", {"label": "same", "method": "lora"}]}, "asks for one trial twice"),
        ({"settings": {"epoch": 3}}, "There is no setting called `epoch`. Did you mean `epochs`"),
        ({"grid": {"lr": [-1]}}, "The setting `lr` is -1"),
        ({"grid": {"lr": 1}}, "settings, each with a list of values"),
        ({"seeds": []}, "it has to be whole numbers"),
        ({"seeds": [1, 1]}, "has `1` twice among its seeds"),
        ({"name": "../up"}, "its name becomes a folder"),
        ({"profile": "slow"}, "it has to be quick or full"),
        ({"rates": {"low": 1}}, "`rates` without `trials`"),
        ({"rates": {"trials": 3, "low": 5, "high": 2}}, "`low` above 0 and below `high`"),
        ({"tasks": ["category:nothing"]}, "no task of it can be run here"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidValue, UnknownName)) as caught:
        design(**change)
    assert said in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidValue, match="does not say its `backbones` and `methods`"):
        study_from_dict({"name": "x", "tasks": ["bbc-news"]})


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=r"nothing\.yaml` cannot be read"):
        read_study(tmp_path / "nothing.yaml")
