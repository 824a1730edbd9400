"""``deltatune hub``: push, pull, list, show and search, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.deltas import files
from tests.checkpoint.hub.conftest import Saved
from tests.checkpoint.hub.conftest import saved as saved
from tests.cli.conftest import Call, refused


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def pushed(call: Call, place: Path, saved: Saved) -> str:
    """The id of one delta in a hub, under the name bbc."""
    folder = saved("a", task="bbc-news", metric="accuracy", score=0.9, backbone_id="sentence-transformers/all-MiniLM-L6-v2")
    done = call("hub", "push", folder, "bbc", "--hub", place, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["name"] == "bbc" and found["hub"] == str(place)
    id: str = found["id"]
    return id


def test_there_and_back(call: Call, pushed: str, place: Path, tmp_path: Path) -> None:
    done = call("hub", "pull", "bbc", "--hub", place, "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["folder"] == str(tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "saved" / "a")
    refused(call("hub", "pull", "bbc", "--hub", place, "--out", tmp_path / "out"), "not empty")
    assert call("hub", "pull", pushed[:8], "--hub", place, "--out", tmp_path / "out", "--overwrite").code == 0


def test_listing(call: Call, pushed: str, place: Path) -> None:
    for words in (("hub", "list", "--hub", place), ("hub", "--hub", place)):
        [entry] = json.loads(call(*words, "--json").out)
        assert (entry["id"], entry["names"], entry["method"], entry["score"]) == (pushed, ["bbc"], "lora", 0.9)
        shown = " ".join(call(*words).out.split())
        parts = ("bbc", pushed[:12], "lora", "bbc-news", "0.9000 accuracy", "1 delta in", "trained", "stored", f"--hub {place}")
        assert [part for part in parts if part not in shown] == []


def test_the_environment_names_the_hub(call: Call, pushed: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_HUB", str(place))
    assert len(json.loads(call("hub", "list", "--json").out)) == 1
    monkeypatch.delenv("DELTATUNE_HUB")
    monkeypatch.setenv("XDG_DATA_HOME", str(place.parent / "home"))
    assert json.loads(call("hub", "list", "--json").out) == []
    assert "holds no delta yet. deltatune hub push DIR NAME brings one." in " ".join(call("hub", "list").out.split())


def test_show(call: Call, pushed: str, place: Path) -> None:
    found = json.loads(call("hub", "show", "bbc", "--hub", place, "--json").out)
    assert found["id"] == pushed and "| score | 0.9000 accuracy |" in found["card"]
    shown = call("hub", "show", "bbc", "--hub", place).out
    assert "library_name" not in shown
    assert f'hub.pull("{place}", "bbc", "bbc")' in shown and f"--hub {place}" in shown and "HUB" not in shown


def test_the_licence_of_a_known_backbone_is_on_the_card(call: Call, pushed: str, place: Path) -> None:
    card = (place / "objects" / pushed / "README.md").read_text()
    assert "| backbone's licence | Apache-2.0 (weights), MIT (package) |" in card


def test_search(call: Call, pushed: str, place: Path) -> None:
    def found(*words: object) -> int:
        return len(json.loads(call("hub", "search", "--hub", place, *words, "--json").out))

    assert found() == found("--backbone", "minilm") == found("--backbone", "sentence-transformers/all-MiniLM-L6-v2") == 1
    assert found("--task", "bbc-news", "--method", "lora", "--min-score", 0.5, "--metric", "accuracy") == 1
    assert found("--backbone", "gpt2") == found("--task", "sst2") == found("--min-score", 0.95) == found("--method", "bitfit") == 0
    digits = json.loads(call("hub", "list", "--hub", place, "--json").out)[0]["fingerprint"][:8]
    assert found("--fingerprint", digits) == 1
    none = call("hub", "search", "--hub", place, "--task", "sst2", "--min-score", 0.5)
    assert f"No delta in {place} has all of --task sst2 --min-score 0.5." in " ".join(none.out.split())


def test_a_name_is_moved_only_when_asked(call: Call, pushed: str, place: Path, saved: Saved) -> None:
    other = saved("b", seed=4)
    refused(call("hub", "push", other, "bbc", "--hub", place), "`bbc`", pushed[:12], "--overwrite")
    done = call("hub", "push", other, "bbc", "--hub", place, "--overwrite")
    assert done.code == 0 and "bbc is " in done.out
    assert "It is " in call("hub", "push", other, "--hub", place).out


def test_bad_words(call: Call, pushed: str, place: Path, tmp_path: Path) -> None:
    refused(call("hub", "pull", "bcc", "--hub", place), "Did you mean `bbc`?")
    refused(call("hub", "push", tmp_path, "--hub", place), "no delta in")
    refused(call("hub", "list", "--hub", "nosuch://place"), "nosuch://place")
    refused(call("hub", "pull", "hf://me"), "Which delta of `hf://me`")
