"""A composition is one artefact: its members, how they act together, and the mixers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint.record import sealed
from deltatune.errors import CheckpointError, ForeignBackbone
from deltatune.injection.compose import Composition
from deltatune.injection.slot import How
from tests.checkpoint.deltas import backbone, same, small, state, train
from tests.models import output

WEIGHTS = {"weighted": (0.25, -0.5)}
WHOLE = ("sequential", "parallel")


def composed(how: str, members: tuple[str, ...] = ("lora", "adapter")) -> tuple[Composition, nn.Module, dict[str, Tensor]]:
    """Trained deltas that act together; the first has the head, unless heads would be weighed."""
    model, inputs = backbone("bert", head=1)
    names = []
    for k, method in enumerate(members):
        names.append(train(dt.attach(model, small(method), name=method.replace("-", "_"), head=k == 0 and how in WHOLE), seed=k).name)
    composition = dt.compose(model, names, how=how, weights=WEIGHTS.get(how), name="both")
    with torch.no_grad():
        for k, tensor in enumerate(composition.mixing.state_dict().values()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)))
    return composition, model, inputs


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("how", get_args(How))
def test_round_trip(how: str, tmp_path: Path) -> None:
    names = ("ia3", "adapter") if how == "fusion" else ("lora", "adapter")  # a fusion needs common sites
    composition, first, inputs = composed(how, names)
    assert dt.save(composition, tmp_path / "a", task="both-tasks", labels=["x", "y", "z"]) == tmp_path / "a"
    second, _ = backbone("bert", head=2 if how in WHOLE else 1)
    before = state(second)
    loaded = dt.load(second, tmp_path / "a")
    assert isinstance(loaded, Composition) and (loaded.name, loaded.how, loaded.weights) == ("both", how, composition.weights)
    with torch.no_grad():
        assert torch.equal(output(first, inputs), output(second, inputs))
    dt.save(loaded, tmp_path / "b", task="both-tasks", labels=["x", "y", "z"])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    mixers = {"delta.safetensors"} if how in ("gated", "fusion") else set()
    members = {f"members/{member}/{file}" for member in names for file in ("delta.json", "delta.safetensors")}
    assert set(tree(tmp_path / "a")) == {"delta.json"} | mixers | members
    loaded.dissolve()
    for delta in dt.deltas(second):
        dt.detach(delta)
    assert same(state(second), before)


def test_every_kind_together(tmp_path: Path) -> None:
    composition, first, inputs = composed("weighted", ("lora", "bitfit"))
    dt.save(composition, tmp_path / "a")
    second, _ = backbone("bert", head=1)
    dt.load(second, tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(output(first, inputs), output(second, inputs), atol=1e-6)
    context, first, inputs = composed("sequential", ("prompt-tuning", "ia3"))
    dt.save(context, tmp_path / "b")
    second, _ = backbone("bert", head=2)
    dt.load(second, tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(output(first, inputs), output(second, inputs))


def test_the_record(tmp_path: Path) -> None:
    composition, _, _ = composed("sequential")
    dt.save(composition, tmp_path / "a", backbone_id="minilm", score=0.5)
    record = read(tmp_path / "a")
    assert record.is_composition and record.about.score == 0.5 and record.origin.id == "minilm"
    assert [member.name for member in record.member_records] == ["lora", "adapter"]
    assert [member.origin.num_labels for member in record.member_records] == [3, None]
    with pytest.raises(CheckpointError, match="is a composition of `lora`, `adapter`, not one delta"):
        record.build_method()


def test_a_member_loads_alone(tmp_path: Path) -> None:
    composition, _, _ = composed("parallel")
    dt.save(composition, tmp_path / "a")
    member = tmp_path / "a" / "members" / "lora"
    assert read(tmp_path / "a").origin.fingerprint.samples and not read(member).origin.fingerprint.samples
    assert dt.load(backbone("bert")[0], member).name == "lora"
    other, _ = backbone("bert")
    with torch.no_grad():
        other.get_parameter("bert.encoder.layer.1.output.dense.weight").add_(0.1)
    with pytest.raises(ForeignBackbone, match="other weights in some of its parameters"):
        dt.load(other, member)


def test_names_that_are_taken(tmp_path: Path) -> None:
    composition, _, _ = composed("parallel")
    dt.save(composition, tmp_path / "a")
    model, _ = backbone("bert")
    dt.load(model, tmp_path / "a")
    again = dt.load(model, tmp_path / "a", name="second", enable=False)
    assert isinstance(again, Composition)
    assert again.members == ("second-lora", "second-adapter") and not again.enabled


def test_a_failed_load_leaves_no_trace(tmp_path: Path) -> None:
    composition, _, _ = composed("gated")
    folder = dt.save(composition, tmp_path / "a")
    model, _ = backbone("bert")
    before, names = state(model), [name for name, _ in model.named_modules()]

    def refused(words: str, kind: type[CheckpointError] = CheckpointError) -> None:
        with pytest.raises(kind, match=words):
            dt.load(model, tmp_path / "b")
        assert same(state(model), before) and [name for name, _ in model.named_modules()] == names
        shutil.rmtree(tmp_path / "b")

    def copy() -> Path:
        return Path(shutil.copytree(folder, tmp_path / "b"))

    member = copy() / "members" / "adapter"
    data = json.loads((member / "delta.json").read_text())
    data["method"]["fields"]["activation"] = "relu"
    (member / "delta.json").write_bytes(sealed(data))
    refused("is not the member that")
    (copy() / "members" / "adapter" / "delta.safetensors").write_bytes(b"1234")
    refused("truncated")
    shutil.rmtree(copy() / "members" / "adapter")
    refused("cannot be read")
    (copy() / "delta.safetensors").unlink()
    refused("cannot be read")
    for change, words in (
        ({"how": "sideways"}, "composition.how = 'sideways', which is not of type"),
        ({"weights": [1.0]}, "composes 2 different members with 1 weights"),
        ({"members": [], "weights": []}, "composes 0 different members"),
        ({"members": [["../a", ""], ["b", ""]]}, "names no delta"),
        ({"members": [["lora"], ["b"]]}, "which is not of type"),
    ):
        data = json.loads((copy() / "delta.json").read_text())
        data["composition"].update(change)
        (tmp_path / "b" / "delta.json").write_bytes(sealed(data))
        refused(words)
    copy()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1)
        before = state(model)
    refused("other weights", ForeignBackbone)


def test_overwriting_a_composition_by_a_delta(tmp_path: Path) -> None:
    composition, _, _ = composed("gated")
    dt.save(composition, tmp_path / "a")
    dt.save(composition.deltas[0], tmp_path / "a", overwrite=True)
    assert set(tree(tmp_path / "a")) == {"delta.json", "delta.safetensors"}
