"""What is wrong in one row stays in it: numbers that are not finite, whatever the operator, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, DoRA, LoRA, LoReFT, MiSS, NormTuning, ParallelAdapter, PrefixTuning, PromptTuning, VeRA
from deltatune.multi.operators.dense import Dense
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import batch, far, forget, naive, routed

METHODS: list[Any] = [
    LoRA(rank=2), Adapter(bottleneck_dim=4), ParallelAdapter(3), DoRA(rank=2), VeRA(rank=4), IA3(), NormTuning(), LoReFT(rank=2),
    MiSS(rank=2), PrefixTuning(2, reparameterization=False), PromptTuning(2),
]  # fmt: skip


def three(method: Any) -> nn.Module:
    backbone, _ = fresh("llama")
    with torch.no_grad():
        for k, name in enumerate(("bad", "good", "other")):
            shake(dt.attach(backbone, method, name=name, head=False), seed=k)
    return backbone


def spoil(backbone: nn.Module, number: float) -> None:
    bad = next(delta for delta in dt.deltas(backbone) if delta.name == "bad")
    bad.load_state_dict({name: torch.full_like(tensor, number) for name, tensor in bad.state_dict().items()})


@torch.no_grad()
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_delta_of_nan_spoils_its_own_rows_only(method: Any, number: float) -> None:
    backbone = three(method)
    dt.switch(backbone, None)
    spoil(backbone, number)
    for length in (3, 9):
        inputs = batch(4, length=length, padding=False)
        with dt.route(backbone, ["bad", "good", None, "other"]):
            found = [output(backbone, inputs) for _ in range(3)]
        expected = naive(backbone, [None, "good", None, "other"], inputs)
        for own in found:
            assert far(own[1:], expected[1:]) < 1e-5
            assert not own[0].isfinite().all()


@torch.no_grad()
def test_what_is_whole_again_is_dense_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, called = three(LoRA(rank=2)), []
    dt.switch(backbone, None)
    whole = Dense.added
    monkeypatch.setattr(Dense, "added", lambda self, *args: called.append(1) or whole(self, *args))
    inputs = batch(2, padding=False)
    before = routed(backbone, ["bad", "good"], inputs)
    assert called
    bad = next(delta for delta in dt.deltas(backbone) if delta.name == "bad")
    kept = {name: tensor.clone() for name, tensor in bad.state_dict().items()}
    spoil(backbone, float("nan"))
    called.clear()
    routed(backbone, ["bad", "good"], inputs)
    assert not called
    bad.load_state_dict(kept)
    assert far(routed(backbone, ["bad", "good"], inputs), before.unbind()) < 1e-6
    assert called


@pytest.mark.parametrize("entries", [["bad", "good", None], ["bad", "good"], ["good", "bad", "other", "good"]], ids=str)
@pytest.mark.parametrize("method", METHODS[:6] + METHODS[7:9], ids=lambda method: type(method).__name__)
def test_gradients_of_the_neighbours_stay_finite(method: Any, entries: list[Any]) -> None:
    """Both where a row's numbers and where only its loss is not finite."""
    backbone, found = three(method), []
    for delta in dt.deltas(backbone):
        delta.enable()
    good = next(delta for delta in dt.deltas(backbone) if delta.name == "good")
    place, inputs = entries.index("bad"), batch(len(entries), padding=False)
    for factor in (1.0, float("nan"), float("inf")):
        forget(backbone)
        if factor == float("inf"):
            spoil(backbone, factor)
        weights = torch.ones(len(entries))
        weights[place] = factor if factor != factor else 1.0
        with dt.route(backbone, entries):
            (weights * output(backbone, inputs).square().flatten(1).mean(1)).sum().backward()
        found.append([parameter.grad.clone() for parameter in good.parameters() if parameter.grad is not None])
    assert found[0]
    for other in found[1:]:
        for one, own in zip(found[0], other, strict=True):
            assert own.isfinite().all()
            assert float((one - own).abs().max()) <= 1e-5 * max(float(one.abs().max()), 1e-3)


@torch.no_grad()
def test_deltas_of_several_types_keep_theirs() -> None:
    backbone, _ = fresh("mlp")
    for k, name in enumerate("ab"):
        shake(dt.attach(backbone, LoRA(rank=2), ["0"], name=name), seed=k, spread=1.0)
    for parameter in dt.deltas(backbone)[0].parameters():
        parameter.data = parameter.data.bfloat16()
    dt.switch(backbone, "b")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    expected: Tensor = backbone(x)
    dt.switch(backbone, None)
    for order in ("ab", "ba"):
        for name in "ab":
            dt.bank(backbone).remove(name)
        for name in order:
            dt.bank(backbone).add(name)
        with dt.route(backbone, ["b", "a"]):
            assert far(backbone(x)[:1], expected[:1].unbind()) < 1e-6
