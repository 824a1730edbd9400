"""Bad input: one clear message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import io
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltatune.checkpoint.record import sealed
from deltatune.training.predict import Predictor
from tests.cli.conftest import Call, refused, tune_words, write_texts
from tests.training.tiny import folder

TUNE = ("tune", "--backbone", "minilm", "--task", "bbc-news", "--method", "lora")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("tune", "--backbone", "minilm", "--task", "bbc-news", "--method", "lroa"), ("No method is called `lroa`", "`lora`")),
        (("tune", "--backbone", "minilm", "--task", "bbc-news", "--method", "LoRA"), ("No method is called `LoRA`", "`lora`")),
        ((*TUNE, "--set", "rnak=4"), ("LoRA has no field called `rnak`", "`rank`")),
        ((*TUNE, "--set", "rank=0"), ("rank=0", "greater than 0")),
        ((*TUNE, "--set", "rank=many"), ("rank='many'", "a whole number")),
        ((*TUNE, "--set", "rank"), ("`rank` sets nothing", "FIELD=VALUE")),
        ((*TUNE, "--set", "rank=2", "--set", "rank=4"), ("set twice",)),
        (("tune", "--backbone", "minilm", "--task", "bcb-news", "--method", "lora"), ("No task is called `bcb-news`", "`bbc-news`")),
        (("tune", "--backbone", "minilmm", "--task", "bbc-news", "--method", "lora"), ("No backbone is called `minilmm`", "`minilm`")),
        (
            (*TUNE, "--where", "attention.qurey"),
            ("No site", "`attention.qurey`", "`attention.query`", "`deltatune inspect --backbone NAME`"),
        ),
        ((*TUNE, "--layers", "6-9"), ("layers 0 to 5",)),
        ((*TUNE, "--layers", "some"), ("--layers 'some'", "top:3")),
        ((*TUNE, "--layers", ""), ("--layers ''", "top:3")),
        ((*TUNE, "--layers", "top:99"), ("`--layers top:99`", "layers 0 to 5", "`--layers top:1`")),
        ((*TUNE, "--where", ""), ("`--where` was given nothing",)),
        ((*TUNE, "--quantize", "int4"), ("int4", "int8", "nf4")),
        ((*TUNE, "--lr", "-1"), ("`--lr`", "greater than 0")),
        ((*TUNE, "--framing", "text2text"), ("encoder",)),
        ((*TUNE, "--epochs", "many"), ("--epochs",)),
        ((*TUNE, "--rank", "8"), ("--rank",)),
        ((*TUNE, "--data", "x.csv"), ("--task bbc-news", "--data x.csv")),
        (("tune", "--method", "lora"), ("`--backbone`", "`--task`")),
        ((*TUNE, "--lr", "inf"), ("`--lr`", "finite")),
        ((*TUNE, "--template", "99"), ("`--template 99`", "`--framing text2text`")),
        ((*TUNE, "--seed", str(2**70)), ("`--seed`", "less than")),
        ((*TUNE, "--report-to", "tensorbord"), ("no experiment tracker `tensorbord`", "`tensorboard`")),
        (("tune", "--config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("predict", "nowhere", "text"), ("no delta in `nowhere`",)),
        (("eval", "nowhere"), ("no delta in `nowhere`",)),
        (("inspect",), ("folder", "--backbone")),
        (("inspect", "nowhere"), ("no delta in `nowhere`",)),
        (("methods", "show", "bitfti"), ("`bitfit`",)),
        (("tasks", "show", "bbcnews"), ("`bbc-news`",)),
        (("tasks", "list", "--category", "tpoic"), ("`topic`",)),
        (("backbones", "show", "gtp2"), ("`gpt2`",)),
        (("tnue",), ("tnue", "tune")),
        (("methods", "shwo"), ("shwo", "show")),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else None,
)
def test_what_was_asked_found_and_to_do(
    words: tuple[str, ...], parts: tuple[str, ...], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(call(*words), *parts)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_need_a_named_folder(
    call: Call, encoder: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = tune_words(encoder, texts, tmp_path / "unused")
    del words[words.index("--out") : words.index("--out") + 2]
    refused(call(*words), "--out DIR")


def _headlines(place: Path, content: bytes, name: str = "texts.csv") -> Path:
    file = place / name
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("empty",)),
        (b"headline,topic\n", ("no rows",)),
        (b"headline,topic\ngoal,sport\n  ,money\n", ("no text", "row 2")),
        (b"headline,topic\ngoal,sport\nshare,\n", ("no label", "row 2")),
        (b"headline,topic\ncaf\xe9,sport\n", ("not UTF-8", "line 2", "0xe9")),
        (b"title,topic\ngoal,sport\n", ("no column `headline` for the text", "`title`, `topic`", "`--text COLUMN`")),
        (b"headline,topics\ngoal,sport\n", ("no column `topic` for the label", "Did you mean `topics`?", "`--label COLUMN`")),
        (b"headline,topic\ngoal,sport\nshare,money\nteam,sport\n", ("3 rows were read", "at least 3 different texts", "has 2")),
        (b"headline,topic\ngoal,sport\nteam,sport\n", ("one class only", "`sport`")),
        (b"headline,topic\n" + b"goal,sport\nshare,money\n" * 20, ("40 rows were read, 38 duplicates left out",)),
    ],
    ids=[
        "empty",
        "no rows",
        "empty text",
        "empty label",
        "not UTF-8",
        "no such column",
        "no such label",
        "too few",
        "one class",
        "duplicates",
    ],
)
def test_data_that_cannot_be_used(content: bytes, parts: tuple[str, ...], call: Call, encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused(call(*tune_words(encoder, _headlines(tmp_path, content), out)), *parts)
    assert not out.exists()


def test_texts_that_cannot_be_labelled_cost_no_loading(call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Predictor, "open")
    refused(call("predict", finished, "goal", "  "), "Row 2", "no text")
    refused(call("predict", finished, b"caf\xe9".decode("utf-8", "surrogateescape")), "not UTF-8")
    for piped, parts in ((b"goal\ncaf\xe9\n", ("not UTF-8", "line 2")), (b"", ("no text",)), (b"goal\n\nteam\n", ("Row 2", "no text"))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped)))
        refused(call("predict", finished), *parts)


def test_labels_that_do_not_fit_the_delta(call: Call, finished: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "headlines.csv"
    other.write_text(write_texts(other).read_text().replace("money", "finance"))
    written = (copied / "run.yaml").read_text().splitlines()
    (copied / "run.yaml").write_text("\n".join(f"  path: {other}" if line.startswith("  path:") else line for line in written))
    refused(call("eval", copied), "trained for the labels", "finance")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("truncated tensors", "delta.safetensors"),
        ("edited tensors", "delta.safetensors"),
        ("truncated record", "delta.json"),
        ("edited record", "delta.json"),
        ("no tensors", "delta.safetensors"),
    ],
)
def test_a_delta_file_that_was_changed(change: str, part: str, call: Call, finished: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    tensors, record = copied / "delta" / "delta.safetensors", copied / "delta" / "delta.json"
    if change == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif change == "edited tensors":
        held = bytearray(tensors.read_bytes())
        held[-1] ^= 1
        tensors.write_bytes(held)
    elif change == "truncated record":
        record.write_text(record.read_text()[:-40])
    elif change == "edited record":
        record.write_text(record.read_text().replace('"alpha": 16.0', '"alpha": 1600.0'))
    else:
        tensors.unlink()
    for words in (("predict", copied, "goal"), ("eval", copied)):
        refused(call(*words), part)


def test_a_delta_of_another_backbone(call: Call, finished: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    other = folder("roberta", tmp_path)
    record = copied / "delta" / "delta.json"
    held = json.loads(record.read_text())
    held["backbone"]["id"] = other
    record.write_bytes(sealed(held))
    refused(call("predict", copied, "goal"), "backbone")


def test_a_finished_run_is_not_overwritten_unasked(call: Call, encoder: str, texts: Path, finished: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    refused(call(*tune_words(encoder, texts, copied)), "finished run", "--overwrite")
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before
    done = call(*tune_words(encoder, texts, copied, "--seed", 9, "--overwrite", "--json"))
    assert done.code == 0, done.err
    assert "seed: 9" in (copied / "run.yaml").read_text()


def test_a_folder_of_something_else_is_left_alone(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused(call(*tune_words(encoder, texts, tmp_path, "--overwrite")), "`thesis.tex`", "no run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written(call: Call, encoder: str, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(call(*tune_words(encoder, texts, tmp_path / "file" / "run")), str(tmp_path / "file"))
    refused(call(*tune_words(encoder, texts, Path("/proc/deltatune/run"))), "/proc/deltatune")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def full_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: what a full disk is like, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("encoder", "texts")
@pytest.mark.parametrize("full_disk", [600, 1300, 8000, 12_000, 24_000, 30_000], indirect=True)
def test_a_full_disk(call: Call, encoder: str, texts: Path, tmp_path: Path, full_disk: None, request: pytest.FixtureRequest) -> None:
    """It stops at the run's file, at the delta, inside torch's own writing of the optimiser, or at the picture."""
    refused(call(*tune_words(encoder, texts, tmp_path / "run")), "cannot be written", "space")
    left = {entry.name for entry in tmp_path.glob("run/*")}
    assert left == (set() if request.node.callspec.params["full_disk"] < 30_000 else {"run.yaml", "delta", "checkpoints"})


@pytest.mark.parametrize("full_disk", [8000], indirect=True)
def test_a_full_disk_does_not_cost_the_run_that_was_to_be_replaced(
    call: Call, encoder: str, texts: Path, copied: Path, full_disk: None
) -> None:
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    refused(call(*tune_words(encoder, texts, copied, "--overwrite")), "cannot be written", "space")
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before
