"""What was trained is scored on the rows it was trained on, and on other tasks: translated into its own, or as themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import InvalidValue, UnknownName
from deltatune.study.procedures import elsewhere as module
from deltatune.study.procedures import procedures, train
from deltatune.study.trial import Trial
from deltatune.tasks import Rows, Task, TaskData, Template, Verbalizer
from deltatune.training.run import DataFile, Run, load_data, method_from_dict
from deltatune.training.settings import Settings
from tests.cli.conftest import write_texts
from tests.training.tiny import folder

OTHER = "bbc-news"
"""A name that is known; its rows are put in its place."""


def trial(place: Path, backbone: str, also: Any, **options: Any) -> Trial:
    """A LoRA on made-up texts, scored elsewhere too."""
    data = DataFile(str(write_texts(place / "headlines.csv", 90)), text="headline", label="topic")
    settings = Settings(max_steps=4, batch_size=8, lr=5e-3, evaluations=1, test_rows=9)
    run = Run(folder(backbone, place), data, (method_from_dict({"name": "lora", "rank": 2}),), settings=settings)
    return Trial(run, "lora", "elsewhere", options={"also": also, **options})


def known_as_other(asked: Trial, monkeypatch: pytest.MonkeyPatch) -> TaskData:
    """The trial's own rows under other names, with their labels in another order."""
    own = load_data(asked.run.task)
    [text] = own.task.text
    labels = tuple(f"the {name}" for name in reversed(own.task.labels))
    task = Task(OTHER, "classification", ("body",), "kind", labels=labels, templates=(Template("{body} Topic:", Verbalizer(labels)),))
    rows = Rows({"body": own.test[text], "kind": [len(labels) - 1 - value for value in own.test[own.task.label]]})
    data = TaskData(task, rows, rows, rows, "made up")
    monkeypatch.setattr(module, "load_data", lambda task, settings=None: data if task == OTHER else load_data(task, settings))
    return data


def test_a_head_is_asked_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path, "bert", [])
    names = {f"the {name}": name.upper() for name in load_data(asked.run.task).task.labels}
    asked = Trial(asked.run, "lora", "elsewhere", options={"also": {"headlines": ["train", {"task": OTHER, "labels": names}]}})
    known_as_other(asked, monkeypatch)
    outcome = procedures["elsewhere"](asked, tmp_path / "t")
    also = outcome.numbers["also"]
    assert also["train"]["rows"] == also[OTHER]["rows"] == 9
    assert also[OTHER]["score"] == pytest.approx(outcome.numbers["score"])  # the same rows, drawn the same way
    assert also["train"]["metric"] == outcome.numbers["metric"]
    monkeypatch.setattr(train, "dt_train", None)  # after a kill the finished run is not done again
    assert procedures["elsewhere"](asked, tmp_path / "t").numbers == outcome.numbers


def test_words_are_asked_another_task_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trial(tmp_path, "llama", ["train", OTHER], asked="as itself")
    data = known_as_other(asked, monkeypatch)
    seen: list[Task] = []
    original = module.score_rows
    monkeypatch.setattr(module, "score_rows", lambda framing, *args: seen.append(framing.task) or original(framing, *args))
    also = procedures["elsewhere"](asked, tmp_path / "t").numbers["also"]
    assert [task.labels for task in seen] == [load_data(asked.run.task).task.labels, data.task.labels]
    assert 0 <= also[OTHER]["score"] <= 1


def test_what_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValue, match="was given `also: None`"):
        procedures["elsewhere"](trial(tmp_path, "bert", None), tmp_path / "t")
    with pytest.raises(InvalidValue, match="`asked: loudly`"):
        procedures["elsewhere"](trial(tmp_path, "bert", ["train"], asked="loudly"), tmp_path / "t")
    with pytest.raises(InvalidValue, match=r"the entry \{'tasks': 'a'\}"):
        procedures["elsewhere"](trial(tmp_path, "bert", [{"tasks": "a"}]), tmp_path / "t")
    with pytest.raises(UnknownName, match="No task is called `nothing`"):
        procedures["elsewhere"](trial(tmp_path, "bert", ["nothing"]), tmp_path / "t")
    asked = trial(tmp_path, "bert", [OTHER])
    other, own = known_as_other(asked, monkeypatch), load_data(asked.run.task).task
    with pytest.raises(InvalidValue, match="cannot be asked `bbc-news`"):
        module.translated(other.test, other.task, own, {})
