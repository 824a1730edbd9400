"""MAM and UniPELT: one layer of BERT by hand, their sizes, their parts' life, and what may not be a part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import MAM, BitFit, DiffPruning, LoRA, Method, ParallelAdapter, UniPELT
from deltatune.methods.composed import Composed, Part
from deltatune.methods.gating import gated
from deltatune.methods.kinds import Family, Kind
from deltatune.structure.where import find_sites
from tests.conformance.cells import fresh, moved, shake, small
from tests.models import output


@dataclass
class Changes:
    """What a delta does to one layer, as plain functions."""

    query: Any = lambda x: 0
    value: Any = lambda x: 0
    prefix: Any = None
    ffn: Any = lambda x, y: 0


def bert_layer(layer: Any, x: Tensor, changes: Changes) -> Tensor:
    """A post-norm layer, (batch, n, d) -> (batch, n, d)."""
    batch, n, d = x.shape
    own, heads = layer.attention.self, layer.attention.self.num_attention_heads
    q = F.linear(x, own.query.weight, own.query.bias) + changes.query(x)
    k = F.linear(x, own.key.weight, own.key.bias)
    v = F.linear(x, own.value.weight, own.value.bias) + changes.value(x)
    q, k, v = (part.view(batch, n, heads, -1).transpose(1, 2) for part in (q, k, v))
    P_k, P_v = changes.prefix(x)
    k, v = torch.cat([P_k, k], dim=2), torch.cat([P_v, v], dim=2)
    h = torch.softmax(q @ k.mT / math.sqrt(d // heads), dim=-1) @ v
    h = h.transpose(1, 2).reshape(batch, n, d)
    out = layer.attention.output
    x = F.layer_norm(x + F.linear(h, out.dense.weight, out.dense.bias), (d,), out.LayerNorm.weight, out.LayerNorm.bias, out.LayerNorm.eps)
    h = F.gelu(F.linear(x, layer.intermediate.dense.weight, layer.intermediate.dense.bias))
    y = F.linear(h, layer.output.dense.weight, layer.output.dense.bias)
    norm = layer.output.LayerNorm
    return F.layer_norm(x + y + changes.ffn(x, y), (d,), norm.weight, norm.bias, norm.eps)


def patched(method: Method) -> tuple[Any, Delta, dict[str, Any]]:
    """BERT's first layer in double precision with a trained delta, and its tensors by role and name."""
    backbone, _ = fresh("bert")
    delta = attach(backbone, method, layers=0, head=False)
    shake(delta, spread=0.3)
    backbone.double()
    tensors = {entry.site.leaf: dict(entry.patch.named_parameters()) for entry in delta.entries}
    shared = {} if delta.shared is None else {name.partition(".")[2]: parameter for name, parameter in delta.shared.named_parameters()}
    return backbone.bert.encoder.layer[0], delta, tensors | {"shared": shared}


def prefix_of(shared: dict[str, Tensor], own: dict[str, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """P_k and P_v, (heads, l, head_dim), from E and the MLP."""
    made = torch.tanh(shared["E"] @ shared["W_1"].T + shared["c_1"]) @ own["W_2"].T + own["c_2"]
    P_k, P_v = made.view(len(made), 2, heads, -1).unbind(1)
    return P_k.transpose(0, 1), P_v.transpose(0, 1)


def gate(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(batch, 1, 1): the mean over the positions of each row."""
    return torch.stack(
        [torch.stack([1 / (1 + torch.exp(-(token @ tensors["gate.w"] + tensors["gate.b"]))) for token in row]).mean() for row in x]
    ).view(-1, 1, 1)


@pytest.mark.parametrize("reparameterization", [True, False])
@torch.no_grad()
def test_mam_by_hand(reparameterization: bool) -> None:
    layer, _, t = patched(MAM(num_virtual_tokens=3, bottleneck_dim=5, scale=2.5, reparameterization=reparameterization, mid_dim=6))
    heads, x = layer.attention.self.num_attention_heads, torch.randn(2, 7, 32, dtype=torch.float64)
    down = {name.removeprefix("bottleneck."): tensor for name, tensor in t["down"].items()}

    def prefix(x: Tensor) -> tuple[Tensor, ...]:
        own = t["attention"]
        P = prefix_of(t["shared"], own, heads) if reparameterization else (own["P_k"], own["P_v"])
        return tuple(part.expand(len(x), -1, -1, -1) for part in P)

    def ffn(x: Tensor, y: Tensor) -> Tensor:
        return 2.5 * ((x @ down["D.W"].T + down["D.b"]).clamp(min=0) @ down["U.W"].T + down["U.b"])

    expected = bert_layer(layer, x, Changes(prefix=prefix, ffn=ffn))
    assert (first(layer(x)) - expected).abs().max() < 1e-10


@torch.no_grad()
def test_unipelt_by_hand() -> None:
    layer, _, t = patched(UniPELT(rank=2, num_virtual_tokens=3, reduction=8, mid_dim=6))
    heads, x = layer.attention.self.num_attention_heads, torch.randn(2, 7, 32, dtype=torch.float64)

    def low_rank(leaf: str) -> Any:
        own = t[leaf]
        return lambda x: gate(x, own) * (x @ own["inner.lora_A"].T @ own["inner.lora_B"].T)

    def prefix(x: Tensor) -> tuple[Tensor, ...]:
        own = {name.removeprefix("inner."): tensor for name, tensor in t["attention"].items()}
        return tuple(gate(x, own)[..., None] * part for part in prefix_of(t["shared"], own, heads))

    def ffn(x: Tensor, y: Tensor) -> Tensor:
        own = {name.removeprefix("inner.bottleneck."): tensor for name, tensor in t["down"].items()}
        return gate(y, own) * ((y @ own["D.W"].T + own["D.b"]).clamp(min=0) @ own["U.W"].T + own["U.b"])

    expected = bert_layer(layer, x, Changes(low_rank("query"), low_rank("value"), prefix, ffn))
    assert (first(layer(x)) - expected).abs().max() < 1e-10


def first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


@torch.no_grad()
def test_a_row_does_not_see_the_others() -> None:
    """No row is padded here: as in the authors' code, a gate's mean runs over padding too."""
    backbone, inputs = fresh("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    shake(attach(backbone, small("unipelt"), head=False), spread=0.5)
    together = output(backbone, inputs)
    for row in range(len(together)):
        alone = output(backbone, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=1e-5)


def test_sizes() -> None:
    """MAM's published share of BART-large, and UniPELT's parts on BERT-base."""
    size = dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16)
    with torch.device("meta"):
        bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**size))
        bert = transformers.BertModel(transformers.BertConfig())
    mam = attach(bart, MAM(bottleneck_dim=512, reparameterization=False)).budget()
    assert mam.delta == 36 * 2 * 30 * 1024 + 24 * (2 * 1024 * 512 + 512 + 1024)
    assert mam.ratio == pytest.approx(0.067, abs=5e-4)
    unipelt = attach(bert, UniPELT(reparameterization=False)).budget()
    parts = 2 * 2 * 8 * 768, 2 * 10 * 768, 2 * 768 * 48 + 48 + 768, 4 * 769
    assert unipelt.delta == 12 * sum(parts)


@pytest.mark.parametrize("name", ["mam", "unipelt"])
@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
@torch.no_grad()
def test_export_keeps_the_outputs_and_is_loaded(name: str, model: str, tmp_path: Path) -> None:
    backbone, inputs = fresh(model)
    delta = attach(backbone, small(name), name="d")
    shake(delta, spread=0.3)
    found, trained = output(backbone, inputs), delta.budget().delta
    method = delta.method
    assert isinstance(method, Composed) and not method.is_exported(delta.patches)
    dt.save(delta, tmp_path / "training", unfinished=True)
    method.export(delta.patches, delta.shared)
    assert method.is_exported(delta.patches) and delta.budget().delta < trained
    torch.testing.assert_close(output(backbone, inputs), found, atol=1e-6, rtol=1e-5)
    dt.save(delta, tmp_path / "final")
    for folder in ("training", "final"):
        other, _ = fresh(model)
        loaded = dt.load(other, tmp_path / folder)
        assert isinstance(loaded, Delta) and method.is_exported(loaded.patches) == (folder == "final")
        torch.testing.assert_close(output(other, inputs), found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [MAM(), UniPELT()], ids=["mam", "unipelt"])
def test_its_roles_are_those_of_its_parts(method: Composed) -> None:
    assert set(method.where) == {role for part in method.parts for role in part.method.where}
    backbone, _ = fresh("bart")
    for part in method.parts:
        delta = attach(backbone, method, list(part.method.where), head=False)
        alone = attach(backbone, part.method, head=False)
        assert [entry.key for entry in delta.entries] == [entry.key for entry in alone.entries]


def test_fields() -> None:
    for wrong in (dict(num_virtual_tokens=0), dict(bottleneck_dim=0), dict(scale=0.0), dict(mid_dim=0)):
        with pytest.raises(InvalidValue, match=f"`{next(iter(wrong))}` must be greater than 0"):
            MAM(**wrong)
    for wrong in (dict(rank=0), dict(num_virtual_tokens=0), dict(reduction=0), dict(mid_dim=0)):
        with pytest.raises(InvalidValue, match=f"`{next(iter(wrong))}` must be greater than 0"):
            UniPELT(**wrong)
    with pytest.raises(InvalidValue, match="`activation` is one of"):
        UniPELT(activation="swish")


@dataclass(frozen=True)
class Mixture(Composed):
    """Any parts."""

    family: ClassVar[Family] = "addition"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("*",)

    mixed: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.mixed


@torch.no_grad()
def test_recipes_of_your_own() -> None:
    """LoRA at the queries and biases everywhere, as one delta."""
    backbone, inputs = fresh("bert")
    method = Mixture((Part(LoRA(rank=2), gate="input"), Part(BitFit())))
    delta = attach(backbone, method, ["attention.query", "feed_forward.up"], head=False)
    assert {entry.site.leaf for entry in delta.entries} == {"query", "up"}
    plain = output(backbone, inputs)
    shake(delta)
    assert moved(output(backbone, inputs), plain) > 1e-3


def test_what_cannot_be_a_part() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=r"DiffPruning.*takes part in the training itself. Attach the two as a list"):
        attach(backbone, Mixture((Part(LoRA()), Part(DiffPruning()))), "attention.query")
    tied, _ = fresh("tied_mlp")
    [site] = find_sites(tied, "first")
    [weight] = LoRA(rank=2).build(site, None)
    with pytest.raises(Unsupported, match="LoRAWeight at `first` cannot have a gate"):
        gated(weight, site, "input")
    [site, *_] = find_sites(backbone, "feed_forward.down")
    [branch] = ParallelAdapter(bottleneck_dim=2).build(site, None)
    with pytest.raises(Unsupported, match=r"Parallel at `.*` cannot have a gate"):
        gated(branch, site, "input")
    assert isinstance(backbone, nn.Module) and not dt.deltas(backbone)
