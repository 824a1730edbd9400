"""The adapters that run in series, against plain-tensor transcriptions of their formulas, and their parameter counts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.attach import attach, detach
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import ledger_of
from deltatune.injection.switching import disabled
from deltatune.methods import Compacter, CompacterPlusPlus, LowRankAdapter, Method, PfeifferAdapter, PHMAdapter
from tests.conformance.cells import fresh, shake
from tests.methods.test_budgets import bert_base, t5_base
from tests.models import output

Matrices = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / 2**0.5))


def of_dense(phi: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return phi["D.W"], phi["U.W"]


def of_factors(phi: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.einsum("rk,dk->rd", phi["D.s"], phi["D.t"]), torch.einsum("dk,rk->dr", phi["U.s"], phi["U.t"])


def of_products(phi: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    def total(side: str) -> Tensor:
        return sum((torch.kron(A, B) for A, B in zip(phi[f"{side}.A"], phi[f"{side}.B"], strict=True)), torch.zeros(()))

    return total("D"), total("U")


def of_shared_products(phi: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    def total(side: str) -> Tensor:
        pairs = zip(phi[f"{side}.s"], phi[f"{side}.t"], strict=True)
        return sum((torch.kron(A, s @ t.T) for A, (s, t) in zip(phi["A"], pairs, strict=True)), torch.zeros(()))

    return total("D"), total("U")


CASES: list[tuple[Method, Matrices, Callable[[Tensor], Tensor]]] = [
    (PfeifferAdapter(reduction=4), of_dense, torch.relu),
    (LowRankAdapter(reduction=4, rank=1), of_factors, gelu),
    (LowRankAdapter(reduction=2, rank=3), of_factors, gelu),
    (PHMAdapter(n=4, reduction=2), of_products, gelu),
    (PHMAdapter(n=3, reduction=2, activation="tanh"), of_products, torch.tanh),
    (Compacter(n=4, reduction=2), of_shared_products, gelu),
    (CompacterPlusPlus(n=2, reduction=4, rank=2), of_shared_products, gelu),
]


def tensors_of(delta: Delta, path: str) -> dict[str, Tensor]:
    """The tensors of one site by their names in the bottleneck, and what is shared."""
    state = delta.state_dict()
    own = {name.removeprefix(f"{path}.bottleneck."): tensor for name, tensor in state.items() if name.startswith(f"{path}.")}
    return own | {name.removeprefix("shared."): tensor for name, tensor in state.items() if name.startswith("shared.")}


@pytest.mark.parametrize(("method", "matrices", "f"), CASES, ids=lambda value: str(value) if isinstance(value, Method) else "")
def test_the_formula_in_double_precision(method: Method, matrices: Matrices, f: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    d = 10 if method == CASES[4][0] else 8  # 3 does not divide 10
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, d)).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    delta = attach(backbone, method, "1")
    assert torch.equal(backbone(x), nn.functional.linear(backbone[0](x), backbone[1].weight, backbone[1].bias)), "fresh: the identity"
    backbone.double()
    shake(delta, spread=0.8)
    phi = tensors_of(delta, "1")
    W_d, W_u = matrices(phi)  # (r, d), (d, r)
    r = len(phi["D.b"])
    h = backbone[0](x) @ backbone[1].weight.T + backbone[1].bias
    expected = h + f(h @ W_d[:r, :d].T + phi["D.b"]) @ W_u[:d, :r].T + phi["U.b"]
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


SELF_ATTENTION = "attention.output", "!cross_attention.output"
COUNTS = [
    (bert_base, PfeifferAdapter(), None, 12 * (2 * 768 * 48 + 48 + 768)),
    (t5_base, LowRankAdapter(), None, 60 * 3 * (768 + 24)),
    (t5_base, LowRankAdapter(rank=4), "feed_forward.down", 24 * 9 * (768 + 24)),
    (t5_base, PHMAdapter(n=12), None, 60 * (2 * (768 * 24 // 12 + 12**3) + 768 + 24)),
    (t5_base, Compacter(), None, 60 * 3 * (768 + 24) + 4**3),
    (t5_base, CompacterPlusPlus(n=8), None, 24 * 3 * (768 + 24) + 8**3),
]


@pytest.mark.parametrize(("build", "method", "where", "count"), COUNTS, ids=lambda value: getattr(value, "__name__", None))
def test_counts(build: Callable[[], nn.Module], method: Method, where: str | None, count: int) -> None:
    assert attach(build(), method, where, head=False).budget().delta == count


@pytest.mark.parametrize(
    ("method", "where", "share"),
    [
        (Compacter(), [*SELF_ATTENTION, "feed_forward.down"], 0.00073),
        (CompacterPlusPlus(), ["feed_forward.down"], 0.00047),
    ],
    ids=["compacter", "compacter++"],
)
def test_shares_of_the_paper(method: Method, where: list[str], share: float) -> None:
    """Karimi Mahabadi et al., table 2, on T5-base: the norms train, too. They need memory, so they are counted instead."""
    backbone = t5_base()
    budget = attach(backbone, method, where, head=False).budget()
    norms = sum(parameter.numel() for name, parameter in backbone.named_parameters() if "layer_norm" in name)
    assert (budget.delta + norms) / budget.N == pytest.approx(share, abs=5e-6)


def test_compacter_trains_the_norms_it_is_given() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, Compacter(), ["feed_forward.down", "norm"], head=False)
    assert {entry.site.leaf for entry in delta.entries} == {"down", "norm"}
    output(backbone, inputs).square().sum().backward()
    assert backbone.get_submodule("bert.embeddings.LayerNorm").weight.grad is not None


def test_compacter_has_one_rule_for_all_sites() -> None:
    backbone, inputs = fresh("t5")
    delta = attach(backbone, Compacter(n=2), head=False)
    rules = [name for name, parameter in delta.named_parameters() if parameter.shape == (2, 2, 2)]
    assert rules == ["shared.A"]
    shake(delta)
    before = output(backbone, inputs).detach()
    with torch.no_grad():
        next(delta.parameters()).zero_()
        delta.load_state_dict({**delta.state_dict(), "shared.A": torch.zeros(2, 2, 2)})
    assert (output(backbone, inputs) - before).abs().max() > 1e-4
    output(backbone, inputs).square().sum().backward()
    assert dict(delta.named_parameters())["shared.A"].grad.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("model", "where"), [("bert", r"re:.*layer\.\d\.output\.LayerNorm"), ("gpt2", "layer"), ("llama", "layer")])
def test_a_pfeiffer_adapter_of_the_residual_stream(model: str, where: str) -> None:
    """N(s + U f(D N(s))) at a norm, h + U f(D h) behind a layer; a copy has its own norm."""
    backbone, inputs = fresh(model)
    plain, names = output(backbone, inputs), [name for name, _ in backbone.named_modules()]
    delta = attach(backbone, PfeifferAdapter(reduction=4), where, name="d", head=False)
    assert len(delta.entries) == 2 and output(backbone, inputs).equal(plain)
    shake(delta)
    expected = output(backbone, inputs)
    assert (expected - plain).abs().max() > 1e-3
    site, bottleneck = delta.entries[0].site, delta.entries[0].patch.bottleneck
    given: list[Tensor] = []
    handle = site.module.register_forward_hook(
        lambda module, args, kept: given.extend([args[0], kept[0] if isinstance(kept, tuple) else kept])
    )
    output(backbone, inputs)
    handle.remove()
    s, found = given
    module: Any = site.module
    with disabled(backbone):
        if site.leaf == "norm":
            torch.testing.assert_close(found, module.forward(s + bottleneck(module.forward(s))))
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert output(twin, inputs).equal(expected)
        [own] = ledger_of(twin).deltas.values()  # type: ignore[union-attr]
        if site.leaf == "norm":
            assert own.entries[0].patch._norm[0] is twin.get_submodule(site.path) is not site.module
    detach(delta)
    assert output(backbone, inputs).equal(plain) and [name for name, _ in backbone.named_modules()] == names


def test_one_pfeiffer_adapter_a_layer() -> None:
    backbone, _ = fresh("t5")
    delta = attach(backbone, PfeifferAdapter(), head=False)
    assert [(entry.site.leaf, entry.site.layer) for entry in delta.entries] == [("down", 0), ("down", 1)] * 2
    backbone, _ = fresh("mixtral")
    with pytest.raises(NoSite, match=r"No site of MixtralForCausalLM matches `feed_forward\.down`"):
        attach(backbone, PfeifferAdapter())


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (PfeifferAdapter, dict(reduction=0)),
        (LowRankAdapter, dict(rank=0)),
        (LowRankAdapter, dict(reduction=-1)),
        (PHMAdapter, dict(n=0)),
        (Compacter, dict(rank=0)),
        (CompacterPlusPlus, dict(activation="mish")),
    ],
)
def test_fields_out_of_range(method: type[Method], fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(InvalidValue, match=rf"{method.__name__}\({name}=.*\) was asked for; `{name}`"):
        method(**fields)
