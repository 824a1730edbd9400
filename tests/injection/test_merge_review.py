"""What a review of the kernel broke in merges and selections: ties, weights of zero, gates, what rests meanwhile, precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.delta import Delta
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.switching import deltas, disabled, switch
from deltatune.methods import IA3, BitFit, FullFineTuning, LinearProbe, LoRA
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch
from deltatune.structure.site import Site
from tests.conformance.cells import moved, shake
from tests.conformance.trace import trace
from tests.models import HIDDEN, gpt2, mlp, output, tied_mlp


def _bits(delta: Delta) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in delta.state_dict().items()}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.01), (0.0, 0.0)])
def test_selections_keep_their_bits_whatever_they_weigh(weights: tuple[float, float]) -> None:
    backbone, inputs = mlp()
    before, plain = trace(backbone), output(backbone, inputs)
    pair = [attach(backbone, BitFit(), "*", name=name) for name in ("a", "b")]
    for k, delta in enumerate(pair):
        switch(backbone, delta.name)
        shake(delta, spread=1.0, seed=k)
    bits = [_bits(delta) for delta in pair]
    composition = compose(backbone, pair, "weighted", weights=weights)
    assert [parameter.requires_grad for parameter in pair[0].parameters()] == [any(weights)] * 3
    for _ in range(3):
        composition.disable()
        composition.enable()
    composition.dissolve()
    for delta, expected in zip(pair, bits, strict=True):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in delta.state_dict().items())
        detach(delta)
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), plain)


def test_a_weighted_selection_learns_for_itself() -> None:
    backbone, _ = mlp()
    pair = [attach(backbone, BitFit(), "0", name=name) for name in ("a", "b")]
    theta = pair[0].entries[0].parameter
    original = theta.detach().clone()
    composition = compose(backbone, pair, "weighted", weights=[2.0, 4.0])
    with torch.no_grad():
        theta.add_(1.0)
    assert torch.allclose(pair[1].state_dict()["0.bias"], original + 0.25)
    assert torch.equal(pair[0].state_dict()["0.bias"], original)
    composition.dissolve()
    pair[0].disable()
    assert torch.allclose(theta, original + 0.25)


def test_a_share_of_a_fused_bias_is_added_not_selected() -> None:
    backbone, inputs = gpt2()
    before, plain = trace(backbone), output(backbone, inputs)
    with pytest.raises(
        Unsupported, match=r"`transformer.h.0.attn.c_attn:query` cannot train in place.*Choose `transformer.h.0.attn.c_attn`"
    ):
        attach(backbone, FullFineTuning(), "attention.query")
    assert trace(backbone).differences(before) == []
    delta = attach(backbone, BitFit(add_missing=False), "attention.{query,value}")
    assert delta.budget().delta == 2 * 2 * HIDDEN
    assert torch.equal(output(backbone, inputs), plain)
    c_attn = backbone.get_submodule("transformer.h.0.attn.c_attn")
    x = torch.randn(3, HIDDEN)
    y = c_attn(x)
    shake(delta)
    changes = (c_attn(x) - y).abs().amax(0).split(HIDDEN)
    assert [bool(part.max() > 0) for part in changes] == [True, False, True]
    detach(delta)
    assert trace(backbone).differences(before) == []


def test_a_tied_parameter_is_selected_once() -> None:
    backbone, _ = tied_mlp()
    delta = attach(backbone, LinearProbe(), lambda site: site.path == "")
    assert [entry.key for entry in delta.entries] == ["first.weight", "first.bias", "second.bias", "last.weight", "last.bias"]


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1])
def test_a_tied_weight_is_merged_once_whoever_owns_it(first: int) -> None:
    backbone, inputs = tied_mlp()
    before = trace(backbone)
    pair = [attach(backbone, LoRA(rank=2), where, name=where) for where in ("first", "second")]
    for k, delta in enumerate(pair):
        shake(delta, spread=0.3, seed=k)
    expected = output(backbone, inputs)
    for step in (merge, unmerge):
        for delta in (pair[first], pair[1 - first]):
            step(delta)
            assert moved(output(backbone, inputs), expected) < 1e-5
    for delta in pair:
        detach(delta)
    assert trace(backbone).differences(before) == []


class Plus(WeightPatch):
    """theta + w."""

    commutes = "add"

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.parameter = "weight"
        self.w = nn.Parameter(torch.zeros_like(theta))

    def forward(self, theta: Tensor) -> Tensor:
        return theta + self.w


@dataclass(frozen=True)
class WeightsOnly(Method):
    """A weight patch for the weight, none for the bias."""

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("*",)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [Plus(site.weight)]


@torch.no_grad()
def test_a_merge_keeps_what_others_merged_into_weight_and_bias() -> None:
    backbone, inputs = mlp()
    pair = [attach(backbone, LoRA(rank=2), "0", name="a"), attach(backbone, WeightsOnly(), "0", name="b")]
    for k, delta in enumerate(pair):
        shake(delta, spread=0.3, seed=k)
    expected = output(backbone, inputs)
    for step, delta in zip((merge, merge, unmerge, unmerge), pair * 2, strict=True):
        step(delta)
        assert moved(output(backbone, inputs), expected) < 1e-5


@torch.no_grad()
def test_nothing_is_merged_past_a_gate() -> None:
    backbone, inputs = mlp()
    for name in ("a", "b", "outer"):
        shake(attach(backbone, LoRA(rank=2), "0", name=name), spread=0.5, seed=ord(name[0]))
    outer = deltas(backbone)[2]
    switch(backbone, None)
    gated = compose(backbone, ["a", "b"], "gated")
    nn.init.normal_(gated.mixers()["0"].U)
    outer.enable()
    with pytest.raises(Unsupported, match="Merge in the order in which they act"):
        merge(outer)
    gated.disable()
    gated.enable()
    expected = output(backbone, inputs)
    merge(outer)  # now it acts inside
    assert moved(output(backbone, inputs), expected) < 1e-5


@torch.no_grad()
def test_resting_selections_come_back_on_top_of_what_was_merged_for_good() -> None:
    backbone, inputs = mlp()
    full = attach(backbone, FullFineTuning(), "*", name="full")
    shake(full)
    full.disable()
    lora = attach(backbone, LoRA(rank=2), "*", name="lora")
    shake(lora, spread=0.3)
    alone = output(backbone, inputs)
    merge(lora, keep=True)
    full.enable()
    assert moved(output(backbone, inputs), alone) > 1e-3
    full.disable()
    assert moved(output(backbone, inputs), alone) < 1e-5
    detach(full)
    assert moved(output(backbone, inputs), alone) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(rank=2), IA3()], ids=str)
def test_merge_into_double_precision(method: Method) -> None:
    backbone, inputs = mlp()
    backbone.double()
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    delta = attach(backbone, method, "*")
    shake(delta, spread=0.3)
    expected = output(backbone, inputs)
    merge(delta)
    assert moved(output(backbone, inputs), expected) < 1e-12


def test_merging_a_delta_that_does_not_act_says_so() -> None:
    backbone, _ = mlp()
    delta = attach(backbone, LoRA(rank=2), "*")
    with disabled(backbone), pytest.raises(Unsupported, match="Enable it first"):
        merge(delta)
    assert not delta.merged


def test_nothing_is_loaded_into_a_merged_delta() -> None:
    backbone, _ = mlp()
    delta = attach(backbone, LoRA(rank=2), "*")
    merge(delta)
    with pytest.raises(Unsupported, match="Cannot load into delta `lora` while it is merged"):
        delta.load_state_dict(delta.state_dict())
