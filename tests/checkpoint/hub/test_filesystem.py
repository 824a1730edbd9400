"""A hub in a folder or in memory: addressed by content, verified, never half-written, listed from its records."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import deltatune as dt
from deltatune.checkpoint import hub
from deltatune.checkpoint.fingerprint import fingerprint
from deltatune.checkpoint.format import read
from deltatune.checkpoint.hub.filesystem import FolderShelf
from deltatune.checkpoint.hub.manifest import MANIFEST
from deltatune.errors import CheckpointError, InvalidValue, OutputError, UnknownName
from tests.checkpoint.deltas import backbone, files, trained
from tests.checkpoint.hub.conftest import Saved
from tests.models import output


def listing(place: str) -> dict[str, bytes]:
    """Every file of a hub and what it holds."""
    system, root = fsspec.core.url_to_fs(place)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in system.find(root)}


def write(place: str, path: str, content: bytes) -> None:
    system, root = fsspec.core.url_to_fs(place)
    system.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{root}/{path}", content)


def test_what_is_pulled_is_what_was_pushed(place: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved("a", task="sst2", metric="accuracy", score=0.9)
    id = hub.push(folder, place, "sst2-lora")
    for k, wanted in enumerate(("sst2-lora", id, id[:8])):
        pulled = hub.pull(place, wanted, tmp_path / f"out{k}")
        assert files(pulled) == files(folder)
        assert sorted(path.name for path in pulled.iterdir()) == ["delta.json", "delta.safetensors"]
    model, inputs = backbone("bert")
    expected, _ = backbone("bert")
    dt.load(expected, folder)
    dt.load(model, tmp_path / "out0")
    assert torch.equal(output(model, inputs), output(expected, inputs))


def test_the_id_is_the_hash_of_the_list_of_hashes(place: str, saved: Saved) -> None:
    folder = saved("a")
    id = hub.push(folder, place)
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in ("delta.json", "delta.safetensors"))
    assert id == hashlib.sha256(lines.encode()).hexdigest()
    assert listing(place)[f"objects/{id}/{MANIFEST}"] == lines.encode()
    assert id != hub.push(saved("b", seed=1), place)


def test_pushing_again_changes_nothing(place: str, saved: Saved) -> None:
    folder = saved("a")
    first = hub.push(folder, place, "one")
    before = listing(place)
    assert hub.push(folder, place, "one") == first
    assert listing(place) == before


def test_a_run_leaves_everything_else_at_home(place: str, saved: Saved) -> None:
    folder = saved("a")
    (folder / "secret.txt").write_text("password")
    id = hub.push(folder, place)
    assert sorted(listing(place)) == [f"objects/{id}/{name}" for name in ("README.md", "SHA256SUMS", "delta.json", "delta.safetensors")]


def test_compositions(place: str, tmp_path: Path) -> None:
    model, inputs = backbone("bert")
    pair = [trained(model, "lora", name="a"), trained(model, "adapter", name="b", head=False)]
    dt.save(dt.compose(model, pair, how="sequential", name="both"), tmp_path / "both")
    hub.push(tmp_path / "both", place, "both")
    again, _ = backbone("bert")
    dt.load(again, hub.pull(place, "both", tmp_path / "out"))
    assert torch.equal(output(again, inputs), output(model, inputs))
    [entry] = hub.search(place, method="adapter")
    assert (entry.method, entry.methods) == ("composition", ("adapter", "lora"))
    assert "| `b` | `adapter " in hub.show(place, "both")[1]


def test_a_name_moves_only_when_told_to_and_old_ids_stay(place: str, saved: Saved, tmp_path: Path) -> None:
    old, new = hub.push(saved("a"), place, "best"), hub.push(saved("b", seed=1), place)
    with pytest.raises(OutputError, match=rf"`best` in .* points to another delta already \({old[:12]}\)"):
        hub.push(saved("b2", seed=2), place, "best")
    assert {entry.id: entry.names for entry in hub.entries(place)}[old] == ("best",)
    hub.push(tmp_path / "saved" / "b", place, "best", overwrite=True)
    assert hub.show(place, "best")[0].id == new
    assert hub.pull(place, old, tmp_path / "old").is_dir()


@pytest.mark.parametrize("file", ["delta.json", "delta.safetensors", MANIFEST])
def test_an_edited_file_is_not_pulled(file: str, place: str, saved: Saved, tmp_path: Path) -> None:
    id = hub.push(saved("a"), place, "a")
    path = f"objects/{id}/{file}"
    content = bytearray(listing(place)[path])
    content[-2] ^= 1
    write(place, path, bytes(content))
    with pytest.raises(CheckpointError, match=rf"{file}` was edited or is truncated"):
        hub.pull(place, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".saving")] == []


@pytest.mark.parametrize("name", ["../escaped", "/etc/passwd", "members/../../x/delta.json", "README.md", "a b"])
def test_a_manifest_cannot_name_other_files(name: str, place: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    manifest = f"{digest}  {name}\n{digest}  delta.json\n".encode()
    id = hashlib.sha256(manifest).hexdigest()
    write(place, f"objects/{id}/{MANIFEST}", manifest)
    with pytest.raises(CheckpointError, match="does not list the files of a delta"):
        hub.pull(place, id, tmp_path / "out")
    assert list(tmp_path.rglob("escaped")) == []


def test_a_half_pushed_delta_is_not_there(place: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("a")
    place_file = FolderShelf._place

    class Killed(BaseException):
        pass

    for stage in range(1, 5):
        done: list[str] = []

        def interrupted(self: FolderShelf, content: Any, path: str, stage: int = stage, done: list[str] = done) -> None:
            if len(done) == stage:
                raise Killed
            done.append(path)
            place_file(self, content, path)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(FolderShelf, "_place", interrupted)
            hub.push(folder, f"{place}{stage}", "a")
        names = [entry.names for entry in hub.entries(f"{place}{stage}")]
        assert names == ([] if stage < 4 else [()])
        hub.push(folder, f"{place}{stage}", "a")
        assert [entry.names for entry in hub.entries(f"{place}{stage}")] == [("a",)]


def test_a_lost_file_comes_back_with_the_next_push(place: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved("a")
    id = hub.push(folder, place, "a")
    system, root = fsspec.core.url_to_fs(place)
    system.rm(f"{root}/objects/{id}/delta.safetensors")
    with pytest.raises(CheckpointError, match="could not be read"):
        hub.pull(place, "a", tmp_path / "out")
    hub.push(folder, place, "a")
    assert files(hub.pull(place, "a", tmp_path / "out")) == files(folder)


def test_many_push_at_once(saved: Saved, tmp_path: Path) -> None:
    folders = [saved(f"d{k}", seed=k) for k in range(3)]
    place = tmp_path / "hub"
    faults: list[BaseException] = []

    def push(k: int) -> None:
        try:
            hub.push(folders[k % 3], place, f"name{k}")
            hub.entries(place)
        except BaseException as cause:
            faults.append(cause)

    threads = [threading.Thread(target=push, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    found = hub.entries(place)
    assert sorted(name for entry in found for name in entry.names) == sorted(f"name{k}" for k in range(12))
    assert list((place / "staging").iterdir()) == []
    for entry in found:
        assert read(hub.pull(place, entry.id, tmp_path / "out" / entry.id)).name == entry.name


def test_the_index_is_made_from_the_records(place: str, saved: Saved) -> None:
    hub.push(saved("a", task="sst2", score=0.8), place, "a")
    first = hub.entries(place)
    index = listing(place)["index.json"]
    assert json.loads(index)["entries"][0]["task"] == "sst2"
    system, root = fsspec.core.url_to_fs(place)
    for broken in (
        None,
        b"{",
        b"[]",
        b'{"version": 1, "entries": [{"id": 3}, null]}',
        b'{"version": 99, "entries": []}',
        index.replace(b"0.8", b"NaN"),
    ):
        if broken is None:
            system.rm(f"{root}/index.json")
        else:
            write(place, "index.json", broken)
        assert hub.entries(place) == first
        assert listing(place)["index.json"] == index
    system.rm(f"{root}/objects/{first[0].id}", recursive=True)
    assert hub.entries(place) == []


def test_a_broken_delta_does_not_hide_the_others(place: str, saved: Saved) -> None:
    hub.push(saved("a"), place, "a")
    id = hub.push(saved("b", seed=1), place, "b")
    write(place, f"objects/{id}/delta.json", b"{}")
    assert [entry.names for entry in hub.entries(place)] == [("a",)]


def test_a_broken_name_does_not_hide_the_others(place: str, saved: Saved, tmp_path: Path) -> None:
    hub.push(saved("a"), place, "a")
    write(place, "names/bad", b"../../etc/passwd\n")
    assert [entry.names for entry in hub.entries(place)] == [("a",)]
    with pytest.raises(CheckpointError, match=r"names/bad` does not hold the id of a delta"):
        hub.pull(place, "bad", tmp_path / "out")


def test_a_hub_one_may_only_read_is_listed(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(saved("a"), tmp_path / "hub", "a")

    def refuse(self: FolderShelf, content: Any, path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(FolderShelf, "_place", refuse)
    assert [entry.names for entry in hub.entries(tmp_path / "hub")] == [("a",)]
    with pytest.raises(OutputError, match=r"could not be written: .*Permission denied"):
        hub.push(saved("b", seed=1), tmp_path / "hub", "b")


def test_search(place: str, saved: Saved) -> None:
    model, _ = backbone("bert")
    hub.push(saved("low", task="sst2", metric="accuracy", score=0.5, backbone_id="minilm"), place, "low")
    hub.push(saved("high", seed=1, task="sst2", metric="accuracy", score=0.9, backbone_id="other/one"), place, "high")
    hub.push(saved("bias", "bitfit", task="mnli"), place, "bias")

    def found(**query: Any) -> list[str]:
        return [entry.names[0] for entry in hub.search(place, **query)]

    assert found() == ["high", "low", "bias"]
    assert found(task="sst2", min_score=0.6) == ["high"]
    assert found(min_score=0.5) == ["high", "low"]
    assert found(method="bitfit") == ["bias"]
    assert found(metric="f1") == found(task="rte") == []
    assert found(backbone="minilm") == ["low"]
    assert found(backbone={"minilm", "other/one"}) == ["high", "low"]
    digests = fingerprint(model)
    assert len(found(fingerprint=digests)) == len(found(fingerprint=digests.weights[:6])) == len(found(fingerprint=digests.structure)) == 3
    assert found(fingerprint="0" * 16) == []


def test_the_card(saved: Saved, tmp_path: Path) -> None:
    folder = saved(
        "a", task="sst2", metric="accuracy", score=0.875, labels=["bad|", "good"], backbone_id="google/bert", versions={"torch": "2"}
    )
    id = hub.push(folder, tmp_path / "hub", "sst2", licence="Apache-2.0")
    card = (tmp_path / "hub" / "objects" / id / "README.md").read_text()
    assert card.startswith(
        '---\nlibrary_name: deltatune\nbase_model: "google/bert"\ntags: ["deltatune", "delta-tuning", "lora", "sst2"]\n---\n'
    )
    entry, again = hub.show(tmp_path / "hub", "sst2")
    size = sum(path.stat().st_size for path in folder.iterdir())
    for row in (
        "| score | 0.8750 accuracy |",
        "| backbone's licence | Apache-2.0 |",
        f"| bytes | {size:,} |",
        f"| numbers stored | {entry.parameters:,} |",
        "| labels | `bad/`, `good` |",
        f"| id | `{id}` |",
    ):
        assert f"\n{row}\n" in card
    assert entry.parameters == sum(tensor.numel() for tensor in _tensors(folder).values())
    assert str(tmp_path) not in card
    assert again == card.replace("| backbone's licence | Apache-2.0 |\n", "")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None and len(code[1].strip().splitlines()) == 5
    compile(code[1], "card", "exec")


def test_the_cards_commands_are_safe_to_paste(saved: Saved) -> None:
    from deltatune.checkpoint.hub import card

    text = card(read(saved("a")), "0" * 64, parameters=1, size_bytes=1, source="memory://a b; rm -rf $HOME", name="x")
    assert "--hub 'memory://a b; rm -rf $HOME' --out" in text


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(folder / "delta.safetensors")
    return found


def test_what_is_refused(place: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved("a")
    for name in ("", "..", "a/b", ".hidden", "0" * 64, "with space"):
        with pytest.raises(InvalidValue, match="cannot be called"):
            hub.push(folder, place, name)
    id = hub.push(folder, place, "sst2")
    with pytest.raises(UnknownName, match="Did you mean `sst2`"):
        hub.pull(place, "sst", tmp_path / "out")
    for wanted in ("../names/sst2", "..", "", id[:4], "f" * 64):
        with pytest.raises(UnknownName):
            hub.pull(place, wanted, tmp_path / "out")
    with pytest.raises(InvalidValue, match="Which delta"):
        hub.pull(place, None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no delta in"):
        hub.push(tmp_path, place)
    (folder / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or was edited"):
        hub.push(folder, place)
    hub.pull(place, "sst2", tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        hub.pull(place, "sst2", tmp_path / "out")
    hub.pull(place, "sst2", tmp_path / "out", overwrite=True)


def test_links_do_not_leave_the_folder(saved: Saved, tmp_path: Path) -> None:
    folder = saved("a")
    moved = (folder / "delta.safetensors").rename(tmp_path / "elsewhere")
    (folder / "delta.safetensors").symlink_to(moved)
    with pytest.raises(CheckpointError, match="is a link"):
        hub.push(folder, tmp_path / "hub")


@pytest.mark.parametrize("location", ["nosuch://x", "hf://", "hf://a/b/c"])
def test_no_such_place(location: str, saved: Saved) -> None:
    with pytest.raises(InvalidValue, match=re.escape(location)):
        hub.push(saved("a"), location, "a")


def test_killed_pushes_are_swept_after_a_day(saved: Saved, tmp_path: Path) -> None:
    for left in ("1000-aa", f"{2**40}-bb"):
        (tmp_path / "hub" / "staging" / left).mkdir(parents=True)
    hub.push(saved("a"), tmp_path / "hub")
    assert [path.name for path in (tmp_path / "hub" / "staging").iterdir()] == [f"{2**40}-bb"]
