"""A hub on the Hugging Face Hub, against a stand-in for its API that keeps commits in memory; no network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

import deltatune as dt
from deltatune.checkpoint import hub
from deltatune.checkpoint.hub.entry import count_values
from deltatune.errors import CheckpointError, InvalidValue, OutputError, UnknownName
from tests.checkpoint.deltas import backbone, files, trained
from tests.checkpoint.hub.conftest import Saved


@dataclass
class Repository:
    """Commits, oldest first, and tags on them."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    tags: dict[str, int] = field(default_factory=dict)


class StandIn:
    """The methods of ``HfApi`` that a hub calls, with the server's rules: an old parent is refused, a tag stays."""

    def __init__(self, place: Path) -> None:
        self.repositories: dict[str, Repository] = {}
        self.place = place

    def create_repo(self, repo_id: str, *, repo_type: str | None = None, exist_ok: bool = False) -> None:
        if repo_id in self.repositories and not exist_ok:
            raise OSError("409 Conflict")
        self.repositories.setdefault(repo_id, Repository())

    def model_info(self, repo_id: str, *, revision: str | None = None, files_metadata: bool = False) -> Any:
        if repo_id not in self.repositories:
            raise OSError(f"404 Client Error. Repository Not Found for `{repo_id}`")
        number = self._number(repo_id, revision)
        siblings = [
            SimpleNamespace(rfilename=name, size=len(content) if files_metadata else None)
            for name, content in self.repositories[repo_id].commits[number].items()
        ]
        return SimpleNamespace(sha=f"{number:040x}", siblings=siblings)

    def create_commit(self, repo_id: str, operations: Iterable[Any], *, commit_message: str, parent_commit: str | None = None) -> Any:
        commits = self.repositories[repo_id].commits
        if parent_commit != f"{len(commits) - 1:040x}":
            raise OSError("412 Client Error. A commit has happened since.")
        new = dict(commits[-1])
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del new[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                given = operation.path_or_fileobj
                new[operation.path_in_repo] = given if isinstance(given, bytes) else Path(str(given)).read_bytes()
        commits.append(new)
        return SimpleNamespace(oid=f"{len(commits) - 1:040x}")

    def create_tag(self, repo_id: str, *, tag: str, revision: str, exist_ok: bool = False) -> None:
        self.repositories[repo_id].tags.setdefault(tag, int(revision, 16))

    def list_repo_refs(self, repo_id: str) -> Any:
        return SimpleNamespace(tags=[SimpleNamespace(name=tag) for tag in self.repositories[repo_id].tags])

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        number = self._number(repo_id, revision)
        target = self.place / repo_id / str(number) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.repositories[repo_id].commits[number][filename])
        return str(target)

    def parse_safetensors_file_metadata(self, repo_id: str, filename: str, *, revision: str | None = None) -> Any:
        content = Path(self.hf_hub_download(repo_id, filename, revision=revision)).read_bytes()
        return SimpleNamespace(parameter_count={"F32": count_values(lambda start, end: content[start:end], filename)})

    def list_models(self, *, author: str, filter: str) -> list[Any]:
        assert filter == "deltatune"
        tagged = (
            name for name, repository in self.repositories.items() if b"library_name: deltatune" in repository.commits[-1]["README.md"]
        )
        return [SimpleNamespace(id=name) for name in tagged if name.startswith(f"{author}/")]

    def _number(self, repo_id: str, revision: str | None) -> int:
        repository = self.repositories[repo_id]
        if revision is None:
            return len(repository.commits) - 1
        return repository.tags[revision] if revision in repository.tags else int(revision, 16)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda library_name: stand_in)
    return stand_in


def test_the_stand_in_has_the_apis_own_methods_and_arguments() -> None:
    import inspect

    for name, method in vars(StandIn).items():
        if not name.startswith("_"):
            own, real = inspect.signature(method).parameters, inspect.signature(getattr(HfApi, name)).parameters
            assert own.keys() <= real.keys(), name


@pytest.mark.parametrize(("location", "name"), [("hf://me/bbc", None), ("hf://me", "bbc"), ("hf://me/bbc", "bbc")])
def test_what_is_pulled_is_what_was_pushed(location: str, name: str | None, api: StandIn, saved: Saved, tmp_path: Path) -> None:
    folder = saved("a", task="bbc", score=0.9, metric="accuracy")
    id = hub.push(folder, location, name, licence="MIT")
    for k, (where, wanted) in enumerate([("hf://me/bbc", None), ("hf://me", "bbc"), ("hf://me/bbc", id), ("hf://me/bbc", id[:9])]):
        assert files(hub.pull(where, wanted, tmp_path / f"out{k}")) == files(folder)
    names = set(api.repositories["me/bbc"].commits[-1])
    assert names == {"README.md", "SHA256SUMS", "delta.json", "delta.safetensors"}
    card = api.repositories["me/bbc"].commits[-1]["README.md"].decode()
    assert "| backbone's licence | MIT |" in card and 'hub.pull("hf://me' in card
    [entry] = hub.entries("hf://me")
    assert (entry.id, entry.names, entry.task, entry.score) == (id, ("bbc",), "bbc", 0.9)
    assert entry.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert hub.show("hf://me/bbc")[0] == hub.show("hf://me", "bbc")[0]
    assert hub.search("hf://me", min_score=0.95) == []


def test_pushing_again_makes_no_commit(api: StandIn, saved: Saved) -> None:
    folder = saved("a")
    assert hub.push(folder, "hf://me/a") == hub.push(folder, "hf://me/a")
    assert len(api.repositories["me/a"].commits) == 2


def test_a_newer_one_takes_its_place_and_the_old_stays_under_its_id(api: StandIn, saved: Saved, tmp_path: Path) -> None:
    model, _ = backbone("bert")
    pair = [trained(model, "lora", name="x"), trained(model, "adapter", name="y", head=False)]
    dt.save(dt.compose(model, pair, how="sequential", name="both"), tmp_path / "both")
    old, new = hub.push(tmp_path / "both", "hf://me/a"), saved("new", seed=2)
    with pytest.raises(OutputError, match="points to another delta already"):
        hub.push(new, "hf://me/a")
    id = hub.push(new, "hf://me/a", overwrite=True)
    assert not any(name.startswith("members/") for name in api.repositories["me/a"].commits[-1])
    assert files(hub.pull("hf://me/a", None, tmp_path / "now")) == files(new)
    assert hub.show("hf://me/a", old)[0].method == "composition"
    assert hub.pull("hf://me/a", old[:10], tmp_path / "then").is_dir()
    assert set(api.repositories["me/a"].tags) == {old, id}


def test_somebody_was_faster(api: StandIn, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("a")
    create = api.create_commit

    def late(repo_id: str, operations: Any, **given: Any) -> Any:
        api.repositories[repo_id].commits.append({"other": b""})
        return create(repo_id, operations, **given)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(OutputError, match="412 Client Error"):
        hub.push(folder, "hf://me/a")
    assert "delta.json" not in api.repositories["me/a"].commits[-1]


def test_an_edited_file_is_not_pulled(api: StandIn, saved: Saved, tmp_path: Path) -> None:
    id = hub.push(saved("a"), "hf://me/a")
    commit = api.repositories["me/a"].commits[-1]
    content = commit["delta.safetensors"]
    commit["delta.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(CheckpointError, match=r"delta\.safetensors` was edited or is truncated"):
        hub.pull("hf://me/a", None, tmp_path / "out")
    commit["SHA256SUMS"] = f"{hashlib.sha256(b'x').hexdigest()}  ../x\n".encode()
    with pytest.raises(CheckpointError, match="does not list the files of a delta"):
        hub.pull("hf://me/a", None, tmp_path / "out")
    commit["SHA256SUMS"] = "".join(
        f"{hashlib.sha256(commit[name]).hexdigest()}  {name}\n" for name in ("delta.json", "delta.safetensors")
    ).encode()
    with pytest.raises(CheckpointError, match=f"tag {id} of"):
        hub.pull("hf://me/a", id, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused(api: StandIn, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="needs a name"):
        hub.push(saved("a"), "hf://me")
    with pytest.raises(InvalidValue, match="takes no other name"):
        hub.push(tmp_path / "saved" / "a", "hf://me/a", "b")
    with pytest.raises(InvalidValue, match="Which delta"):
        hub.pull("hf://me", None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="Repository Not Found"):
        hub.pull("hf://me/none", None, tmp_path / "out")
    api.create_repo("me/model")
    with pytest.raises(UnknownName, match="holds no delta"):
        hub.pull("hf://me/model", None, tmp_path / "out")
    hub.push(tmp_path / "saved" / "a", "hf://me/a")
    with pytest.raises(UnknownName, match=r"has no delta `deadbeef`"):
        hub.pull("hf://me/a", "deadbeef", tmp_path / "out")
