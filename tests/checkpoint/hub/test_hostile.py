"""A hub that somebody else wrote: whatever its index, names, manifests and records say, nothing else is touched, and the error is ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltatune.checkpoint import hub
from deltatune.checkpoint.hub import filesystem, shelf
from deltatune.checkpoint.hub.manifest import MANIFEST
from deltatune.checkpoint.record import digest_of
from deltatune.errors import CheckpointError, DeltaError, OutputError
from tests.checkpoint.hub.conftest import Saved
from tests.checkpoint.test_fuzz import bytes_changed, values_changed

ODD_IDS = ["../../escaped", "/etc/passwd", "A" * 64, "0" * 63, "", "\ud800", "0" * 64]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(saved: Saved, tmp_path: Path) -> Path:
    """A hub with two deltas and an index."""
    for seed, name in enumerate(("a", "b")):
        hub.push(saved(name, seed=seed, task="sst2", metric="accuracy", score=0.5 + seed / 4), tmp_path / "hub", name)
    hub.entries(tmp_path / "hub")
    return tmp_path / "hub"


def edited(place: Path, **values: Any) -> None:
    """The index with other values in its first entry."""
    index = json.loads((place / "index.json").read_text())
    index["entries"][0] |= values
    (place / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("id", ODD_IDS)
def test_ids_of_an_index_that_are_none(id: str, place: Path) -> None:
    before = hub.entries(place)
    edited(place, id=id)
    assert hub.entries(place) == before
    assert [entry.id for entry in hub.search(place, task="sst2")] == [before[k].id for k in (0, 1)]


@pytest.mark.parametrize(
    "values",
    [
        {"task": "\x1b]0;owned\x07"},
        {"name": "\ud800"},
        {"method": "x" * 10**5},
        {"fields": {"rank\x1b[2J": 1}},
        {"methods": ["\r\n"]},
        {"size_bytes": -1},
        {"size_bytes": True},
        {"parameters": 2**63 * -1},
        {"score": "1.0"},
        {"task": 7},
        {"stranger": 1},
    ],
)
def test_facts_of_an_index_that_are_none(values: dict[str, Any], place: Path) -> None:
    before = hub.entries(place)
    edited(place, **values)
    assert hub.entries(place) == before


def test_an_index_beyond_all_sense_is_made_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = hub.entries(place), (place / "index.json").read_bytes()
    for content in (
        b"\xff\xfe\x00",
        b"[" * 10**5,
        b'{"version": 1' + b" " * 2 * 10**5,
        whole.replace(b'"version": 1', b'"version": 1e999'),
    ):
        (place / "index.json").write_bytes(content)
        assert hub.entries(place) == before
        assert (place / "index.json").read_bytes() == whole
    monkeypatch.setattr(filesystem, "MAX_INDEX", 100)
    assert hub.entries(place) == before
    (place / "index.json").unlink()
    (place / "index.json").mkdir()
    assert hub.entries(place) == before


def test_names_that_could_steer_a_terminal_are_not_listed(place: Path) -> None:
    before = hub.entries(place)
    for name in ("\x1b[2J", "a b", "-rf"):
        (place / "names" / name).write_text(before[0].id)
    assert hub.entries(place) == before


def forged(place: Path, **values: Any) -> str:
    """Another delta, whole and with all hashes right, whose record says something else; its id."""
    [object_] = [entry.id for entry in hub.entries(place) if entry.names == ("a",)]
    source = place / "objects" / object_
    data = json.loads((source / "delta.json").read_text())
    data |= {key: {**data[key], **value} if isinstance(value, dict) else value for key, value in values.items()}
    content = json.dumps({**data, "digest": digest_of(data)}).encode()
    old, new = (hashlib.sha256(text).hexdigest() for text in ((source / "delta.json").read_bytes(), content))
    manifest = (source / MANIFEST).read_bytes().replace(old.encode(), new.encode())
    id = hashlib.sha256(manifest).hexdigest()
    target = Path(shutil.copytree(source, place / "objects" / id))
    (target / "delta.json").write_bytes(content)
    (target / MANIFEST).write_bytes(manifest)
    return id


@pytest.mark.parametrize("task", ["\x1b]0;owned\x07", "\ud800", "x" * 10**6, "a\r\nb"])
def test_a_record_is_listed_and_shown_in_letters_alone(task: str, place: Path) -> None:
    id = forged(place, task=task)
    found = {entry.id: entry for entry in hub.entries(place)}
    assert len(found) == 3 and len(found[id].task or "") <= 2000 and (found[id].task or "").isprintable()
    entry, card = hub.show(place, id)
    assert entry.task == found[id].task
    assert all(letter.isprintable() or letter == "\n" for letter in card)


def test_records_without_end_are_not_fetched(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MAX_RECORDS", 100)
    with pytest.raises(CheckpointError, match="has records of 3,"):
        hub.show(place, "a")


def test_no_room_is_said_ahead(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 5))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"bytes, and there is room for 5 at"):
        hub.pull(place, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spots(place: Path) -> Iterator[Path]:
    """Files whose content is looked at before any hash is checked, the index most often."""
    while True:
        yield place / "index.json"
        yield from sorted((place / "names").iterdir())
        yield from sorted(place.glob(f"objects/*/{MANIFEST}"))
        yield from sorted(place.glob("objects/*/delta.json"))


def test_damaged_hubs_end_in_our_errors(place: Path, tmp_path: Path) -> None:
    draw, good = random.Random(0), files(place)
    outside = files(tmp_path / "saved")
    refused = 0
    for _, file in zip(range(120), spots(place), strict=False):
        content = file.read_bytes()
        if file.suffix == ".json" and draw.random() < 0.6:
            file.write_text(json.dumps(values_changed(json.loads(content), draw)))
        else:
            file.write_bytes(bytes_changed(content, draw))
        for ask in (
            lambda: hub.entries(place),
            lambda: hub.show(place, "a"),
            lambda: hub.pull(place, "a", tmp_path / "out", overwrite=True),
        ):
            try:
                ask()
            except DeltaError:
                refused += 1
        for path, held in good.items():
            path.write_bytes(held)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(tmp_path / "out")
    assert refused > 50
    assert files(place) == good and files(tmp_path / "saved") == outside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "saved"]
