"""Datasets as the hub gives them: splits under other names, columns inside structs and lists, and what is said where one is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks import load_task
from deltatune.tasks.streaming import stream_data, stream_task
from deltatune.tasks.task import Choices, Hub, Task, read_task

Serve = Callable[[dict[str, list[dict[str, Any]]]], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """The hub answers with these rows, whatever it is asked for."""
    import datasets

    monkeypatch.delenv("DELTATUNE_MIRROR", raising=False)
    monkeypatch.setattr("deltatune.tasks.sources.hub_answers", lambda: True)

    def serve(splits: dict[str, list[dict[str, Any]]]) -> None:
        found = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

        def load_dataset(id: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
            return found[split] if split else datasets.DatasetDict(found)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return serve


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": "yes" if number % 2 else "no"} for number in range(start, start + count)]


def task(**fields: Any) -> Task:
    return Task(**{"name": "some", "type": "classification", "text": ("text",), "labels": ("no", "yes"), "hub": Hub("some/set"), **fields})


def test_of_a_dataset_with_a_test_split_only_all_three_are_cut(serve: Serve) -> None:
    serve({"test": rows(40)})
    one = task(hub=Hub("some/set", splits={"train": "test"}))
    data = load_task(one)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "validation": 4, "test": 8}
    assert len({row["text"] for split in data.splits.values() for row in split}) == 40
    assert data.notes == ("validation is cut from train", "test is cut from train")
    assert sum(1 for _ in stream_task(one)) == 40
    with pytest.raises(DataError, match=r"`some` has no split `test` at its source: it would be cut from train"):
        next(stream_task(one, "test"))


def test_of_a_streamed_dataset_without_a_test_split_the_validation_is_used(serve: Serve) -> None:
    serve({"train": rows(400), "validation": rows(30, 1000)})
    data, whole = stream_data(task(), validation=20), load_task(task())
    assert list(data.test) == list(whole.test) and len(data.validation) == 20
    assert data.notes == (whole.notes[0], "20 rows of validation are held back from train")
    assert data.stream is not None and sum(1 for _ in data.stream(0)) == 380


def test_a_split_that_another_takes_is_read_once(serve: Serve) -> None:
    serve({"validation": rows(40), "test": rows(10, 100)})
    data = load_task(task(hub=Hub("some/set", splits={"train": "validation"})))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 4, "test": 10}


def test_without_train_the_message_says_how_to_name_one(serve: Serve) -> None:
    serve({"test": rows(40)})
    wanted = "`some/set` has no split `train`, of which `train` is made. Found: test. Say `splits: {train: ...}`"
    with pytest.raises(DataError, match=re.escape(wanted)):
        load_task(task())
    with pytest.raises(DataError, match=r"has no split `dev`, of which `train` is made"):
        load_task(task(hub=Hub("some/set", splits={"train": "dev"})))
    with pytest.raises(DataError, match=r"has no split that `train` could be made of. Found: test"):
        load_task(task(hub=Hub("some/set", splits={"test": "train"})))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("{dev: validation}", r"`splits` has the entry `dev`; it maps our splits \(train, validation, test\)"),
        ("{train: test, test: test}", "takes a split of the hub twice"),
    ],
)
def test_splits_that_say_nothing_or_too_much(tmp_path: Path, splits: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"type: classification\ntext: [text]\nlabel: label\nlabels: [a, b]\nhub: {{id: some/set, splits: {splits}}}")
    with pytest.raises(InvalidValue, match=r"`mine.yaml`: .*" + message):
        read_task(file)


@pytest.mark.parametrize("listed", [False, True])
def test_columns_inside_structs_and_lists_of_structs(serve: Serve, listed: bool) -> None:
    """Hubs keep `answers` as a struct of lists, or as a list of structs; a dot leads into both."""

    def answers(number: int) -> Any:
        texts = [f"answer {number}", f"reply {number}"]
        return [{"text": text} for text in texts] if listed else {"text": texts}

    serve({"train": [{"data": {"q": f"why {number}?"}, "answers": answers(number), "first": "x"} for number in range(40)]})
    fields: dict[str, Any] = {"type": "generation", "labels": (), "text": ("data.q",), "label": "first", "references": "answers.text"}
    data = load_task(task(**fields))
    number = data.train[0]["data.q"].removeprefix("why ").removesuffix("?")
    assert data.task.kind.reference(data.task, data.train[0]) == [f"answer {number}", f"reply {number}"]
    named = load_task(task(**{**fields, "text": ("question",), "hub": Hub("some/set", columns={"question": "data.q"})}))
    assert [*named.train["question"]] == [*data.train["data.q"]]


def test_options_inside_a_list_of_structs(serve: Serve) -> None:
    options = [{"key": "x", "text": "one"}, {"key": "y", "text": "two"}]
    serve({"train": [{"q": f"which {number}?", "options": options, "right": "y"} for number in range(40)]})
    choices = Choices(list="options.text", keys="options.key")
    data = load_task(task(type="choice", labels=(), text=("q",), label="right", choices=choices))
    assert data.train[0]["options"] == ["one", "two"] and data.train[0]["right"] == 1


def test_fields_that_are_not_there(serve: Serve) -> None:
    serve({"train": [{"data": {"question": f"why {number}?"}, "label": "no"} for number in range(40)]})
    with pytest.raises(DataError, match=r"Split `train` of `some`: A row has no field `qestion`. Did you mean `question`"):
        load_task(task(text=("data.qestion",)))
    with pytest.raises(DataError, match=r"`label.name` was asked for, but `label` holds 'no', which has no fields"):
        load_task(task(text=("data.question",), label="label.name"))
    with pytest.raises(DataError, match=r"has no column `dat`. Did you mean `data`"):
        load_task(task(text=("dat.question",)))


def test_a_mirror_may_go_by_the_names_of_the_hub_or_by_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("DELTATUNE_MIRROR", str(tmp_path))
    found = []
    for column in ("sentence", "text"):
        folder = tmp_path / column / "default"
        folder.mkdir(parents=True)
        table = pyarrow.Table.from_pylist([{column: row["text"], "label": row["label"]} for row in rows(40)])
        pyarrow.parquet.write_table(table, folder / "train.parquet")
        one = task(hub=Hub(column, columns={"text": "sentence"}))
        found.append(load_task(one))
        assert sum(1 for _ in stream_task(one)) == 40
    assert found[0].fingerprint == found[1].fingerprint


def test_an_empty_split_says_why(serve: Serve) -> None:
    serve({"train": rows(2), "test": [{"text": f"held back {number}", "label": None} for number in range(5)]})
    wanted = (
        "The split `validation` of `some` is empty (7 rows were read, 5 without a label). A split that the source lacks is cut from train, "
        "and that takes at least 3 different texts of a class; the largest class has 1. Add rows."
    )
    with pytest.raises(DataError, match=re.escape(wanted)):
        load_task(task())
