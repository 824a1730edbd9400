"""Command lines run in this process, on a tiny backbone and a file of made-up texts."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deltatune.cli.main import main
from tests.training.tiny import LABELS, folder, rows


@dataclass
class Outcome:
    """Exit code and streams of one command line."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """``call("tune", "--help")``."""
    monkeypatch.setenv("COLUMNS", "140")

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


def refused(outcome: Outcome, *parts: str) -> None:
    """The command ended with one plain message that holds all ``parts``."""
    assert outcome.code == 2, outcome.err
    assert sum(line.startswith("Error: ") for line in outcome.err.splitlines()) == 1 or "Usage: " in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    assert [part for part in parts if part not in outcome.err] == [], outcome.err


def write_texts(file: Path, count: int = 60) -> Path:
    """Texts with the names of their topics, as a CSV."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["headline", "topic"])
        made = rows(count, seed=5)
        writer.writerows((text, LABELS[label]) for text, label in zip(made["text"], made["label"], strict=True))
    return file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    return folder("bert", tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of made-up texts."""
    return write_texts(tmp_path_factory.mktemp("texts") / "headlines.csv")


QUICK = ("--max-steps", 4, "--evaluations", 1, "--batch-size", 8)


def tune_words(encoder: str, texts: Path, out: Path, *more: object) -> list[str]:
    """A quick run on the tiny backbone."""
    words = ["tune", "--backbone", encoder, "--data", texts, "--text", "headline", "--label", "topic", "--method", "lora", "--out", out]
    return [str(word) for word in [*words, *QUICK, *more]]


@pytest.fixture(scope="session")
def finished(encoder: str, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(tune_words(encoder, texts, out, "--json")) == 0
    return out
