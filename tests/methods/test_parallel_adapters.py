"""The adapters beside a sub-layer, against plain-tensor transcriptions of their formulas in whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue, NoSite, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import Method, MultiHeadParallelAdapter, ParallelAdapter, ScaledParallelAdapter
from tests.conformance.cells import fresh, shake
from tests.methods.test_budgets import bert_base, t5_base
from tests.models import HEADS, output


def tensors_of(delta: Delta, path: str) -> dict[str, Tensor]:
    """The tensors of one site, by their last names."""
    prefix = f"{path}."
    return {name.removeprefix(prefix): tensor for name, tensor in delta.state_dict().items() if name.startswith(prefix)}


def seen_by(module: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """What a module is given and returns in a forward, as its neighbours see it."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    run()
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize(
    ("method", "scale"),
    [(ScaledParallelAdapter(bottleneck_dim=3, scale=2.5), 2.5), (ParallelAdapter(bottleneck_dim=3, activation="relu"), 1.0)],
)
def test_the_formula_beside_the_feed_forward_network_of_bert(method: Method, scale: float) -> None:
    backbone, inputs = fresh("bert")
    backbone.double()
    delta = attach(backbone, method, "feed_forward.down", layers=1, head=False)
    backbone.double()
    shake(delta, spread=0.8)
    path = "bert.encoder.layer.1"
    up, down = backbone.get_submodule(f"{path}.intermediate.dense"), backbone.get_submodule(f"{path}.output.dense")
    x, _ = seen_by(up, lambda: backbone(**inputs))
    h, y = seen_by(down, lambda: backbone(**inputs))
    phi = tensors_of(delta, f"{path}.output.dense.bottleneck")
    change = (x @ phi["D.W"].T + phi["D.b"]).clamp(min=0) @ phi["U.W"].T + phi["U.b"]
    torch.testing.assert_close(y, F.linear(h, down.weight, down.bias) + scale * change, atol=1e-10, rtol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"),
        ("llama", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"),
        ("deberta_v2", "deberta.encoder.layer.1.attention.self.value_proj", "deberta.encoder.layer.1.attention.output.dense"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q", "decoder.block.1.layer.1.EncDecAttention.o"),
    ],
)
def test_the_input_of_an_attention_is_found(model: str, first: str, last: str) -> None:
    backbone, inputs = fresh(model)
    delta = attach(backbone, ParallelAdapter(bottleneck_dim=3, activation="tanh"), last, head=False)
    shake(delta, spread=0.8)
    x, _ = seen_by(backbone.get_submodule(first), lambda: output(backbone, inputs))
    delta.disable()
    _, plain = seen_by(backbone.get_submodule(last), lambda: output(backbone, inputs))
    delta.enable()
    _, y = seen_by(backbone.get_submodule(last), lambda: output(backbone, inputs))
    phi = tensors_of(delta, f"{last}.bottleneck")
    change = torch.tanh(x @ phi["D.W"].T + phi["D.b"]) @ phi["U.W"].T + phi["U.b"]
    torch.testing.assert_close(y - plain, change, atol=1e-5, rtol=1e-4)


def test_the_formula_of_every_head() -> None:
    backbone, inputs = fresh("bert")
    backbone.double()
    delta = attach(backbone, MultiHeadParallelAdapter(bottleneck_dim=3, scale=2.0), layers=1, head=False)
    backbone.double()
    path = "bert.encoder.layer.1.attention"
    query, last = backbone.get_submodule(f"{path}.self.query"), backbone.get_submodule(f"{path}.output.dense")
    h = seen_by(last, lambda: backbone(**inputs))[0]
    shake(delta, spread=0.8)
    x, _ = seen_by(query, lambda: backbone(**inputs))
    _, y = seen_by(last, lambda: backbone(**inputs))
    phi = tensors_of(delta, f"{path}.output.dense")
    heads = []
    for i in range(HEADS):
        z = (x @ phi["W_d"][i].T + phi["b_d"][i]).clamp(min=0)
        heads.append(z @ phi["W_u"][i].T + phi["b_u"][i])
    expected = F.linear(h + 2.0 * torch.cat(heads, -1), last.weight, last.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)


COUNTS = [
    (bert_base, ParallelAdapter(), 24 * (2 * 768 * 24 + 24 + 768)),
    (t5_base, ParallelAdapter(), 60 * (2 * 768 * 24 + 24 + 768)),
    (bert_base, ScaledParallelAdapter(bottleneck_dim=512), 12 * (2 * 768 * 512 + 512 + 768)),
    (bert_base, MultiHeadParallelAdapter(bottleneck_dim=2), 12 * (12 * 2 * 768 + 12 * 2 + 768 * 2 + 768)),
]


@pytest.mark.parametrize(("build", "method", "count"), COUNTS, ids=lambda value: getattr(value, "__name__", None))
def test_counts(build: Callable[[], nn.Module], method: Method, count: int) -> None:
    assert attach(build(), method, head=False).budget().delta == count


def test_no_sub_layer_ends_there() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(
        Unsupported, match=r"intermediate\.dense` \(role feed_forward\.up\), where no sub-layer ends\. Choose .*`feed_forward\.down`"
    ):
        attach(backbone, ParallelAdapter(), "feed_forward.up")
    with pytest.raises(
        Unsupported, match=r"\(role feed_forward\.down\), which is no output projection of an attention.*or ParallelAdapter"
    ):
        attach(backbone, MultiHeadParallelAdapter(), "feed_forward.down")
    backbone, _ = fresh("mixtral")
    with pytest.raises(NoSite, match=r"Did you mean `experts\.down`"):
        attach(backbone, ScaledParallelAdapter())
    with pytest.raises(Unsupported, match=r"where no sub-layer ends"):
        attach(backbone, ParallelAdapter(), "experts.down")
    with pytest.raises(Unsupported, match=r"where no sub-layer ends"):
        attach(nn.Sequential(nn.Linear(3, 3)), ParallelAdapter(), "0")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (ParallelAdapter, dict(bottleneck_dim=0)),
        (ScaledParallelAdapter, dict(scale=0)),
        (MultiHeadParallelAdapter, dict(activation="mish")),
    ],
)
def test_fields_out_of_range(method: type[Method], fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(InvalidValue, match=rf"{method.__name__}\({name}=.*\) was asked for; `{name}`"):
        method(**fields)
