from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.backbones.quantize import quantize_in_place
from deltatune.errors import MissingExtra


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
