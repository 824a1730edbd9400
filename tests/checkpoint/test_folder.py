"""A folder is the old or the new one at every moment, and a failed save leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from deltatune.checkpoint import folder as folders
from deltatune.checkpoint import read, replacing
from deltatune.checkpoint.folder import exchange
from deltatune.errors import CheckpointError, OutputError
from tests.checkpoint.deltas import backbone, files, trained

REPOSITORY = Path(__file__).parents[2]


def put(folder: Path, text: str, **options: Any) -> None:
    """Write a folder of two files that belong together."""
    with replacing(folder, **options) as fresh:
        (fresh / "a").write_text(text)
        (fresh / "inner").mkdir()
        (fresh / "inner" / "b").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_folder_with_parents(tmp_path: Path) -> None:
    put(tmp_path / "x" / "y" / "z", "1")
    assert content(tmp_path) == {"x/y/z/a": "1", "x/y/z/inner/b": "1"}


def test_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    put(tmp_path / "z", "1")
    with pytest.raises(OutputError, match=r"exists already and is not empty. Pass overwrite=True"):
        put(tmp_path / "z", "2")
    assert content(tmp_path / "z")["a"] == "1"
    put(tmp_path / "z", "2", overwrite=True)
    assert content(tmp_path) == {"z/a": "2", "z/inner/b": "2"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; a delta is saved as a folder"):
        put(tmp_path / "file", "3", overwrite=True)
    with pytest.raises(OutputError, match=r"cannot be written: (File exists|Not a directory)"):
        put(tmp_path / "file" / "below", "3")
    with pytest.raises(OutputError, match="null byte"):
        put(tmp_path / "a\0b", "3")


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    put(tmp_path / "z", "1")
    (tmp_path / "z" / "notes").mkdir()
    (tmp_path / "z" / "notes" / "c").write_text("mine")
    (tmp_path / "z" / "link").symlink_to("notes/c")
    put(tmp_path / "z", "2", overwrite=True, ours=("a", "inner"))
    assert content(tmp_path / "z") == {"a": "2", "inner/b": "2", "link": "mine", "notes/c": "mine"}
    assert (tmp_path / "z" / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["z"]


def test_a_linked_target_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real")["a"] == "1"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a path as a shell does must have written it so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(Path("~/z"), "1")
    assert content(tmp_path) == {"z/a": "1", "z/inner/b": "1"}
    delta = trained(backbone("bert")[0])
    assert dt.save(delta, "~/d") == tmp_path / "d" and read("~/d").name == "d"
    assert dt.load(backbone("bert")[0], "~/d").name == "d"
    with pytest.raises(CheckpointError, match="There is no delta"):
        read("~nobody-of-that-name/d")


def test_the_permissions_of_a_folder_stay(tmp_path: Path) -> None:
    put(tmp_path / "z", "1")
    (tmp_path / "z").chmod(0o700)
    put(tmp_path / "z", "2", overwrite=True)
    assert stat.S_IMODE((tmp_path / "z").stat().st_mode) == 0o700


@pytest.mark.parametrize("inside", [".", "inner"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_a_process_works_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, overwrite: bool
) -> None:
    """It would go on in a folder that is gone."""
    if overwrite:
        put(tmp_path / "z", "1")
    (tmp_path / "z" / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "z" / inside)
    with pytest.raises(OutputError, match="this process works in it" if overwrite or inside == "." else "not empty"):
        put(tmp_path / "z", "2", overwrite=overwrite)
    put(Path("below"), "3")
    assert Path.cwd().exists() and content(Path("below"))["a"] == "3"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "x" / "z") as fresh:
        (fresh / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call", ["os.fsync", "os.rename", "deltatune.checkpoint.format.write_tensors", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"]
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    delta = trained(backbone("bert")[0])
    with monkeypatch.context() as patched:
        patched.setattr(call, no_space)
        with pytest.raises(OutputError, match=r"cannot be written: No space left on device\. Nothing was changed"):
            dt.save(delta, tmp_path / "runs" / "d")
    assert list(tmp_path.iterdir()) == []
    dt.save(delta, tmp_path / "d")
    before = files(tmp_path / "d")
    with monkeypatch.context() as patched:
        patched.setattr(call, no_space)
        if call == "os.rename":
            patched.setattr(folders, "exchange", lambda a, b: False)
        with pytest.raises(OutputError, match="No space left"):
            dt.save(delta, tmp_path / "d", overwrite=True, task="other")
    assert files(tmp_path / "d") == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        put(tmp_path / "z", "1")


def test_a_really_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with pytest.raises(OutputError, match="No space left on device"), replacing(tmp_path / "z") as fresh:
        (fresh / "a").symlink_to("/dev/full")
        (fresh / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_exchange(tmp_path: Path) -> None:
    put(tmp_path / "a", "1")
    put(tmp_path / "b", "2")
    assert exchange(tmp_path / "a", tmp_path / "b") in (True, False)
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


def test_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "exchange", lambda a, b: False)
    put(tmp_path / "z", "1")
    put(tmp_path / "z", "2", overwrite=True)
    assert content(tmp_path) == {"z/a": "2", "z/inner/b": "2"}


def test_a_swap_killed_between_its_renames_is_finished_by_the_next_reader(tmp_path: Path) -> None:
    saved = dt.save(trained(backbone("bert")[0]), tmp_path / "d")
    record = read(saved)
    saved.rename(tmp_path / ".d.previous")
    assert read(saved) == record


def test_leftovers_of_a_killed_save_are_swept_up(tmp_path: Path) -> None:
    left = tmp_path / ".z.0123.saving"
    left.mkdir()
    (left / "a").touch()
    with replacing(tmp_path / "z") as busy:
        (busy / "a").write_text("1")
        assert not left.exists()
        put(tmp_path / "z", "2")  # another save meanwhile does not touch what is being written
        assert busy.exists()
        shutil.rmtree(tmp_path / "z")
    assert content(tmp_path / "z") == {"a": "1"}


KILLED = """
import os, signal, sys, torch
import deltatune as dt
from deltatune.checkpoint import folder as folders
from deltatune.methods import LoRA
from torch import nn

target, mode = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
deltas = [dt.attach(mlp, LoRA(rank=rank), where=["0", "2"], name=f"d{rank}") for rank in (1, 2)]
if mode == "rename":
    folders.exchange = lambda a, b: False
dt.save(deltas[0], target)

def die_at(step):
    # SIGKILL ourselves at the step-th system call that changes or flushes something
    left = [step]
    def counted(call):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return run
    for name in ("rename", "fsync", "open", "mkdir", "rmdir", "unlink", "link"):
        setattr(os, name, counted(getattr(os, name)))
    folders.exchange = counted(folders.exchange)

def look():
    mlp_of = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    mlp_of.load_state_dict(dt.backbone_state(mlp))
    return dt.load(mlp_of, target).name

seen, step, finished = [], 0, False
while not finished:
    step += 1
    child = os.fork()
    if child == 0:
        die_at(step)
        dt.save(deltas[step % 2], target, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    finished = status == 0
    seen.append(look())
import random, time
for step in range(25):
    child = os.fork()
    if child == 0:
        while True:
            for delta in deltas:
                dt.save(delta, target, overwrite=True)
    time.sleep(random.Random(step).uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.append(look())
dt.save(deltas[0], target, overwrite=True)
import json
print(json.dumps({"steps": len(seen), "seen": sorted(set(seen)), "left": sorted(os.listdir(os.path.dirname(target)))}))
"""


@pytest.mark.parametrize("mode", ["exchange", "rename"])
def test_killed_at_any_moment(tmp_path: Path, mode: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "d"), mode]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)
    assert told["steps"] > 25 + 8
    assert told["seen"] == ["d1", "d2"]
    assert told["left"] == ["d"]


def test_two_deltas_of_one_folder_never_mix(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    first, second = trained(model, name="a"), trained(model, name="b")
    write: Callable[..., Path] = dt.save
    write(first, tmp_path / "d")
    (tmp_path / "d" / "README.md").write_text("mine")
    write(second, tmp_path / "d", overwrite=True)
    assert read(tmp_path / "d").name == "b" and (tmp_path / "d" / "README.md").read_text() == "mine"
