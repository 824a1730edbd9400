"""Weight patches: swapped in for one forward of their host, cached while nothing trains, put back whatever happens."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.switching import refresh
from deltatune.methods import DiffPruning, LoRA
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch
from deltatune.structure.site import Site
from tests.conformance.cells import fresh, shake
from tests.models import HIDDEN, output

CALLS: list[str] = []


@dataclass(frozen=True)
class Power(Method):
    """theta' = factor * theta + shift: chains differ from sums, and calls are counted."""

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("*",)
    identity: ClassVar[bool] = False

    factor: float = 1.0
    shift: float = 0.0

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        return [Scaled(name, self) for name in site.parameters if name.endswith("weight")]


class Scaled(WeightPatch):
    """factor * theta + shift."""

    def __init__(self, parameter: str, method: Power) -> None:
        super().__init__()
        self.parameter = parameter
        self.factor = nn.Parameter(torch.tensor(method.factor))
        self.shift = method.shift

    def forward(self, theta: Tensor) -> Tensor:
        CALLS.append(self.parameter)
        return self.factor * theta + self.shift


def _linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)


def _calls(backbone: nn.Module, x: Tensor) -> int:
    before = len(CALLS)
    backbone(x)
    return len(CALLS) - before


def test_cached_until_something_changes() -> None:
    backbone, x = _linear()
    delta = attach(backbone, Power(2.0), "0")
    with torch.no_grad():
        assert [_calls(backbone, x) for _ in range(3)] == [1, 0, 0]
        next(iter(delta.parameters())).add_(1.0)
        assert [_calls(backbone, x) for _ in range(2)] == [1, 0]
        torch.testing.assert_close(backbone(x), x @ (3 * backbone[0].weight).T + backbone[0].bias)
        backbone[0].weight.mul_(0.5)
        assert [_calls(backbone, x) for _ in range(2)] == [1, 0]
        delta.load_state_dict({name: tensor + 1 for name, tensor in delta.state_dict().items()})
        assert _calls(backbone, x) == 1
        backbone.double()
        assert _calls(backbone, x.double()) == 1
        backbone.float()
    assert [_calls(backbone, x) for _ in range(2)] == [1, 1], "gradients want a graph each time"
    delta.freeze()
    with torch.inference_mode():
        assert backbone(x).shape == (2, 3)


def test_a_replaced_parameter_object_is_seen() -> None:
    backbone, x = _linear()
    attach(backbone, Power(2.0), "0")
    with torch.no_grad():
        backbone(x)
        backbone[0].weight = nn.Parameter(torch.ones(3, 4))
        torch.testing.assert_close(backbone(x), x @ torch.full((3, 4), 2.0).T + backbone[0].bias)


def test_a_cache_is_no_part_of_pickles_and_copies() -> None:
    backbone, x = _linear()
    with torch.no_grad():
        attach(backbone, Power(2.0), "0")
        without = len(pickle.dumps(backbone))
        expected = backbone(x)
        assert abs(len(pickle.dumps(backbone)) - without) < 60
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            other[0].weight.mul_(2)
            torch.testing.assert_close(other(x) - other[0].bias, 2 * (expected - backbone[0].bias))


@pytest.mark.parametrize("how", ["attached", "sequential", "weighted", "parallel"])
def test_several_on_one_parameter(how: str) -> None:
    """One after the other: f_2 (f_1 theta + s_1) + s_2. Side by side: theta + sum_i w_i (g_i(theta) - theta)."""
    backbone, x = _linear()
    theta, b = backbone[0].weight.detach().clone(), backbone[0].bias
    a, c = attach(backbone, Power(2.0, 0.5), "0", name="a"), attach(backbone, Power(-1.5, 0.25), "0", name="c")
    if how != "attached":
        compose(backbone, [a, c], how, weights=[0.3, 0.6] if how == "weighted" else None)  # type: ignore[arg-type]
    first, second = 2 * theta + 0.5, -1.5 * theta + 0.25
    expected = {
        "weighted": theta + 0.3 * (first - theta) + 0.6 * (second - theta),
        "parallel": theta + (first - theta) + (second - theta),
    }.get(how, -1.5 * first + 0.25)
    torch.testing.assert_close(backbone(x), x @ expected.T + b)
    assert torch.equal(backbone[0].weight, theta)
    assert isinstance(backbone[0].weight, nn.Parameter)


def test_the_parameter_stands_in_its_place_after_an_error() -> None:
    backbone, x = _linear()
    attach(backbone, Power(2.0), "0")
    theta = backbone[0].weight
    with pytest.raises(RuntimeError):
        backbone(torch.randn(2, 5))
    assert backbone[0].weight is theta
    assert list(backbone[0]._parameters) == ["weight", "bias"]
    backbone(x)
    assert backbone[0].weight is theta


def test_attention_that_reads_its_projections_itself() -> None:
    """``nn.MultiheadAttention`` never calls ``out_proj`` and reads q, k and v as thirds of ``in_proj_weight``."""
    backbone, inputs = fresh("torch_encoder")
    reference = copy.deepcopy(backbone)
    delta = attach(backbone, LoRA(rank=2, alpha=2), "attention.{query,value,output}")
    shake(delta, spread=0.3)
    assert len(delta.entries) == 6
    with torch.no_grad():
        for entry in delta.entries:
            attention = reference.get_submodule(entry.site.module_path)
            theta = attention.get_parameter(entry.patch.parameter)  # type: ignore[arg-type]
            start = {"query": 0, "value": 2 * HIDDEN}.get(entry.site.leaf, 0)
            theta[start : start + HIDDEN] += entry.patch.lora_B @ entry.patch.lora_A  # type: ignore[operator]
        torch.testing.assert_close(output(backbone, inputs), output(reference, inputs), atol=1e-6, rtol=1e-5)
    output(backbone, inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())


def test_a_tied_parameter_is_one_site_with_all_its_owners() -> None:
    backbone, inputs = fresh("gpt2")
    delta = attach(backbone, DiffPruning(), ["lm_head", "embedding"])
    tied = [entry for entry in delta.entries if entry.parameter is backbone.get_submodule("lm_head").weight]
    assert len(tied) == 1
    assert len(tied[0].hosts) == 2
    shake(delta, spread=0.2)
    seen = []
    for path in ("lm_head", "transformer.wte"):
        module = backbone.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda module, _: seen.append(module._parameters["weight"]))
        output(backbone, inputs)
        handle.remove()
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], tied[0].parameter)
    assert backbone.get_submodule("lm_head").weight is backbone.get_submodule("transformer.wte").weight
    detach(delta)


def test_weights_on_the_meta_device_refuse_when_they_are_needed() -> None:
    with torch.device("meta"):
        backbone = nn.Sequential(nn.Linear(4, 3))
    attach(backbone, DiffPruning(), "0")
    with pytest.raises(Unsupported, match=r"is offloaded or on the meta device; a weight-kind delta needs it in memory"):
        backbone(torch.zeros(2, 4, device="meta"))
    backbone.to_empty(device="cpu")
    assert backbone(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_between_two_evaluations_is_seen(kind: type[torch.optim.Optimizer]) -> None:
    backbone, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    delta = attach(backbone, DiffPruning(), "0")
    optimizer = kind(delta.trained_parameters().values(), lr=0.1, fused=True)  # type: ignore[call-arg]
    backbone(x).sum().backward()
    backbone.eval()
    with torch.no_grad():
        before = backbone(x)
        versions = [parameter._version for parameter in delta.parameters()]
        optimizer.step()
        assert [parameter._version for parameter in delta.parameters()] == versions  # else this test shows nothing
        after = backbone(x)
        twin = copy.deepcopy(backbone)(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, twin)


def test_what_is_written_behind_the_counters_back_needs_a_refresh() -> None:
    backbone, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    delta = attach(backbone, DiffPruning(), "0")
    backbone.eval()
    with torch.no_grad():
        before = backbone(x)
        backbone[0].weight.data.mul_(2)
        assert torch.equal(backbone(x), before)
        refresh(backbone)
        after = backbone(x)
        delta.disable()
        torch.testing.assert_close(after, backbone(x))
    assert not torch.equal(after, before)
    detach(delta)
    refresh(backbone)
