from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.backbones.quantize import quantize_in_place
from deltatune.errors import MissingExtra, Unsupported
from tests.conformance.cells import fresh
from tests.models import DECODERS, ENCODERS, MODELS, SEQ2SEQ, output


@pytest.mark.parametrize(("scheme", "extra", "tolerance"), [("int8", "torchao", 0.1), ("nf4", "bitsandbytes", 0.35)])
def test_quantised_minilm_stays_close_and_lets_gradients_through(scheme: str, extra: str, tolerance: float) -> None:
    pytest.importorskip(extra)
    full = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=3)
    packed = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=3, quantize=scheme)  # type: ignore[arg-type]
    assert (
        type(packed.classifier) is nn.Linear and packed.classifier.weight.dtype == torch.float32 and packed.classifier.weight.requires_grad
    )
    query = packed.bert.encoder.layer[0].attention.self.query
    assert not query.weight.requires_grad
    assert type(query.weight) not in (nn.Parameter, torch.Tensor)
    batch = load_tokenizer("minilm")(["Interest rates rose again.", "A draw."], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = full.bert(**batch).last_hidden_state
    embedded = full.bert.embeddings(batch["input_ids"]).detach().requires_grad_()
    found = packed.bert(
        inputs_embeds=packed.bert.embeddings.word_embeddings(batch["input_ids"]), attention_mask=batch["attention_mask"]
    ).last_hidden_state
    assert 0 < ((found - wanted).norm() / wanted.norm()).item() < tolerance
    packed.bert.encoder(embedded).last_hidden_state.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name, build in MODELS.items() if build in (*ENCODERS, *DECODERS, *SEQ2SEQ)])
@pytest.mark.parametrize(("scheme", "extra", "least"), [("int8", "torchao", 0.99), ("nf4", "bitsandbytes", 0.9)])
def test_outputs_stay_close(name: str, scheme: str, extra: str, least: float) -> None:
    """T5 casts hidden states to the type of `wo`, which for packed weights would be bytes."""
    pytest.importorskip(extra)
    model, inputs = fresh(name)
    with torch.no_grad():
        plain = output(model, inputs)
        if quantize_in_place(model, scheme) == 0:
            assert name in ("gpt2",), "all its maps are Conv1D"
            return
        packed = output(model, inputs)
    assert torch.corrcoef(torch.stack([plain.flatten(), packed.flatten()]))[0, 1] > least


def test_what_has_nothing_to_quantise_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    pytest.importorskip("torchao")
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8)).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"has no `nn\.Linear` to quantise \(GPT2Model"):
        load_backbone(str(tmp_path), auto_class="AutoModel", quantize="int8")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight


def test_tied_layers_and_named_ones_are_left() -> None:
    pytest.importorskip("torchao")
    model = Tied()
    assert quantize_in_place(model, "int8") == 1
    assert model.head.weight is model.embed.weight
    assert quantize_in_place(Tied(), "int8", skip={"body.weight"}) == 0


@pytest.mark.parametrize(("scheme", "module"), [("int8", "torchao.quantization"), ("nf4", "bitsandbytes.nn.modules")])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, scheme: str, module: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtra, match=r"pip install 'deltatune\[quantize\]'"):
        quantize_in_place(Tied(), scheme)
