"""One folder is enough: backbone, tokenizer and delta come back from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import deltatune as dt
from deltatune.errors import CheckpointError, ForeignBackbone, UnknownName
from deltatune.methods import BitFit, LoRA
from tests.checkpoint.deltas import trained
from tests.models import MODELS, output

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(96))]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer in a folder, without a task head."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    MODELS["bert"]()[0].bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(home: Path, labels: tuple[str, ...] = ("a", "b", "c", "d")) -> nn.Module:
    from deltatune.backbones import load_backbone

    return load_backbone(home, auto_class="AutoModelForSequenceClassification", label_names=labels)


@pytest.mark.parametrize("run", [True, False])
def test_everything_from_one_folder(home: Path, tmp_path: Path, run: bool) -> None:
    model = classifier(home)
    delta = trained(model, LoRA(rank=2), name="topics")
    dt.save(delta, tmp_path / "out" / "delta", backbone_id=str(home), labels=["a", "b", "c", "d"])
    before = torch.get_rng_state()
    backbone, tokenizer, opened = dt.open(tmp_path / "out" if run else tmp_path / "out" / "delta", name="again")
    assert torch.equal(torch.get_rng_state(), before)
    assert opened.name == "again" and backbone.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"} and not backbone.training
    batch = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(output(model, batch), output(backbone, batch))


def test_a_composition(home: Path, tmp_path: Path) -> None:
    model = classifier(home)
    trained(model, LoRA(rank=2), name="a", head=False)
    trained(model, BitFit(), name="b")
    dt.save(dt.compose(model, ["a", "b"], name="ab"), tmp_path / "out", backbone_id=str(home))
    backbone, tokenizer, opened = dt.open(tmp_path / "out")
    assert isinstance(opened, dt.Composition)
    batch = tokenizer(["w1 w2 w3"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(output(model, batch), output(backbone, batch), atol=1e-6)


def test_a_model_without_a_head_of_ours(home: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(home).eval()
    dt.save(trained(model, LoRA(rank=2), head=False), tmp_path / "out", backbone_id=str(home))
    with pytest.raises(ForeignBackbone, match="other weights in"):
        dt.open(tmp_path / "out")
    backbone, _, _ = dt.open(tmp_path / "out", allow_foreign=True, device="cpu")
    assert type(backbone) is type(model)


def test_what_is_not_said_is_asked_for(home: Path, tmp_path: Path) -> None:
    model = classifier(home)
    delta = trained(model, LoRA(rank=2))
    dt.save(delta, tmp_path / "nameless")
    with pytest.raises(CheckpointError, match=r"does not say the name of its backbone \(BertForSequenceClassification\)"):
        dt.open(tmp_path / "nameless")
    assert dt.open(tmp_path / "nameless", backbone=str(home))[2].name == "d"
    dt.save(delta, tmp_path / "moved", backbone_id="no-such-backbone")
    with pytest.raises(UnknownName, match="no-such-backbone"):
        dt.open(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="There is no delta in"):
        dt.open(tmp_path / "nowhere")


def test_a_class_that_transformers_does_not_make(home: Path, tmp_path: Path) -> None:
    mlp = nn.Sequential(nn.Linear(2, 2))
    dt.save(trained(mlp, LoRA(rank=1), where="0"), tmp_path / "out", backbone_id=str(home))
    with pytest.raises(CheckpointError, match="belongs to a Sequential, which no auto class of transformers makes"):
        dt.open(tmp_path / "out")
