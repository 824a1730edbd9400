"""Prefixes that depend on the attention's input equal constant ones with the values they took."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.injection.prefix import PrefixAct
from deltatune.methods import PrefixTuning
from deltatune.methods.addition.prefix import key_value_shape
from deltatune.methods.kinds import ConditionalPrefixPatch, Family, Kind, Method, Patch
from deltatune.structure.site import Site
from tests.models import MODELS, output

VIRTUAL = 3
NAMES = ("bert", "gpt2", "llama", "mistral", "t5", "bart", "vit")


@dataclass(frozen=True)
class Scaled(Method):
    """P scaled by g = sigmoid(mean(x) u), one number a row."""

    family: ClassVar[Family] = "addition"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("attention",)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [ScaledPrefix(*key_value_shape(site))]


class ScaledPrefix(ConditionalPrefixPatch):
    num_virtual_tokens = VIRTUAL

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.P_k, self.P_v = (nn.Parameter(torch.randn(heads, VIRTUAL, head_dim)) for _ in range(2))
        self.u = nn.Parameter(torch.randn(32) * 0.3)
        self.gates: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.sigmoid(x.float().mean(1) @ self.u)[:, None, None, None]
        if not torch.compiler.is_compiling():
            self.gates.append(g.detach())
        return self.P_k * g, self.P_v * g


@pytest.mark.parametrize("name", NAMES)
def test_every_row_sees_the_prefix_that_its_input_asks_for(name: str) -> None:
    model, inputs = MODELS[name]()
    plain = copy.deepcopy(model)
    delta = dt.attach(model, Scaled(), head=False)
    found = output(model, inputs)
    constant = dt.attach(plain, PrefixTuning(VIRTUAL, reparameterization=False), head=False)
    for row in range(2):
        for entry, other in zip(delta.entries, constant.entries, strict=True):
            (g,) = entry.patch.gates
            assert g.shape == (2, 1, 1, 1) and not torch.allclose(g[0], g[1], rtol=1e-3)
            with torch.no_grad():
                other.patch.P_k.copy_(entry.patch.P_k * g[row])
                other.patch.P_v.copy_(entry.patch.P_v * g[row])
        torch.testing.assert_close(found[row], output(plain, inputs)[row], atol=1e-5, rtol=1e-5)
    assert all(not entry.site.module.deltatune.acts[PrefixAct]._inputs for entry in delta.entries)


def test_constant_and_conditional_prefixes_join_in_order() -> None:
    model, inputs = MODELS["gpt2"]()
    dt.attach(model, Scaled())
    alone = output(model, inputs)
    other = dt.attach(model, PrefixTuning(2, reparameterization=False, init_std=1.0))
    together = output(model, inputs)
    assert not torch.allclose(together, alone)
    other.disable()
    assert output(model, inputs).equal(alone)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant: bool) -> None:
    model, inputs = MODELS["llama"]()
    delta = dt.attach(model, Scaled())
    model.train()
    wanted = torch.autograd.grad(output(model, inputs).square().sum(), list(delta.parameters()))
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    output(model, inputs).square().sum().backward()
    for parameter, grad in zip(delta.parameters(), wanted, strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


def test_compiles_whole() -> None:
    model, inputs = MODELS["bert"]()
    dt.attach(model, Scaled())
    wanted = output(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


def test_generates_with_and_without_a_copy() -> None:
    model, inputs = MODELS["gpt2"]()
    dt.attach(model, Scaled())
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = model.generate(**inputs, **settings)
    assert tokens.shape == (2, 16)
    assert copy.deepcopy(model).generate(**inputs, **settings).equal(tokens)
