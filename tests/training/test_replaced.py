"""A run that overwrites another one: until it is finished the other is to be had, whatever happens; and only runs are overwritten."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from deltatune.errors import Diverged, OutputError
from deltatune.methods import LoRA
from deltatune.training import replaced
from deltatune.training.place import OURS
from deltatune.training.replaced import REPLACED, Replaced
from deltatune.training.trainer import last_checkpoint
from tests.training import tiny
from tests.training.killed import kill, run

METHOD = LoRA(rank=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replaced") / "run"
    run("bert", METHOD, str(out), max_steps=2)
    return out


@pytest.fixture
def out(first: Path, tmp_path: Path) -> Path:
    """A finished run, to be overwritten."""
    return shutil.copytree(first, tmp_path / "run")


@pytest.mark.parametrize("theirs", [None, "- a: list\n", "defaults:\n  - model\n"], ids=["none", "a list", "another program's"])
def test_what_is_no_run_of_ours_is_not_overwritten(theirs: str | None, tmp_path: Path) -> None:
    for name in ("metrics.json", "logs/mine.txt", "checkpoints/big.bin", "delta/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    if theirs is not None:
        (tmp_path / "run.yaml").write_text(theirs)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="which is no run" if theirs is None else r"cannot be read as a run's.* empty the folder"):
            run("bert", METHOD, str(tmp_path), overwrite=overwrite)
    assert contents(tmp_path) == before


def _fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["place.write_text", "trainer.write_state", "train.save"])
def test_a_new_run_that_fails_gives_way_to_the_old_one(fault: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"deltatune.training.{fault}", _fail)
    before = contents(out)
    with pytest.raises((OSError, OutputError), match="No space left"):
        run("bert", METHOD, str(out), overwrite=True, seed=1, max_steps=3)
    resumable = fault == "train.save"  # there is a checkpoint from which the new one can go on
    assert contents(out / REPLACED if resumable else out) == before


def test_a_new_run_that_diverges_gives_way_to_the_old_one(out: Path) -> None:
    before = contents(out)
    with pytest.raises(Diverged):
        run("bert", METHOD, str(out), overwrite=True, lr=1e30, max_grad_norm=0)
    assert contents(out) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_killed_one_leaves_the_old_run_beside_it_and_goes_on(overwrite: bool, out: Path, tmp_path: Path) -> None:
    before = contents(out)
    assert kill("bert", METHOD, str(out), "step:6", overwrite=True, seed=1) == -signal.SIGKILL
    assert contents(out / REPLACED) == before
    assert dt.load(tiny.backbone("bert"), out / REPLACED / "delta").name == "lora"
    assert last_checkpoint(out / "checkpoints") is not None
    with pytest.raises(OutputError, match=r"unfinished run that differs: settings\.seed"):
        run("bert", METHOD, str(out), seed=2)
    whole = run("bert", METHOD, str(tmp_path / "whole"), seed=1)
    resumed = run("bert", METHOD, str(out), overwrite=overwrite, seed=1)
    assert resumed.history == whole.history
    assert {entry.name for entry in out.iterdir()} == {"delta", "metrics.json", "curve.png", "run.yaml"}
    assert (out / "delta/delta.safetensors").read_bytes() == (tmp_path / "whole/delta/delta.safetensors").read_bytes()


def test_a_killed_one_makes_way_for_a_third(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(out)
    assert kill("bert", METHOD, str(out), "step:6", overwrite=True, seed=1) == -signal.SIGKILL
    with monkeypatch.context() as patched, pytest.raises(OutputError):
        patched.setattr("deltatune.training.trainer.write_state", _fail)
        run("bert", METHOD, str(out), overwrite=True, seed=2)
    assert contents(out) == before, "the third failed, and the first is back"


def test_killed_while_files_move_the_old_run_is_put_back(out: Path) -> None:
    before = contents(out)
    assert kill("bert", METHOD, str(out), "move:3", overwrite=True) == -signal.SIGKILL
    assert contents(out) != before
    with pytest.raises(OutputError, match="holds a finished run"):
        run("bert", METHOD, str(out))
    assert contents(out) == before


def test_no_file_is_lost_whenever_the_moving_ends(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def until(last: int) -> None:
        count = iter(range(last))

        def ended(entry: Path, target: Path) -> None:
            if next(count, None) is None:
                raise Killed
            move(entry, target)

        monkeypatch.setattr(replaced, "move", ended)

    move, before, place = replaced.move, contents(out), Replaced(out, OURS)
    for last in range(len(OURS)):
        until(last)
        with pytest.raises(Killed):
            place.set_aside()
        assert place.is_between and not place.is_whole
        for again in range(len(OURS)):
            until(again)
            with pytest.raises(Killed):
                place.put_back()
            assert place.is_between
        until(len(OURS))
        place.put_back()
        assert contents(out) == before and not place.place.exists()


def test_killed_at_the_very_end_the_new_run_stays(out: Path) -> None:
    """``metrics.json`` is there, and of the old run only a part."""
    shutil.copytree(out, out / REPLACED)
    (out / REPLACED / "metrics.json").unlink()
    with pytest.raises(OutputError, match="holds a finished run"):
        run("bert", METHOD, str(out))
    (out / REPLACED / "run.yaml").unlink()
    shutil.rmtree(out / REPLACED / "delta")
    (out / REPLACED / "curve.png").unlink()
    before = contents(out)
    with pytest.raises(OutputError, match="holds a finished run"):
        run("bert", METHOD, str(out))
    assert contents(out) == before and not (out / REPLACED).exists()
