"""AdapterFusion: its formula, what trains, where it can sit, and that it learns whom to ask."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import Composition, compose
from deltatune.injection.mixers import MIXERS, Fusion
from deltatune.injection.slot import How
from deltatune.injection.switching import deltas, disabled
from deltatune.injection.ways import WAYS
from deltatune.methods import IA3, Adapter, BitFit, LinearProbe, LoRA, Method
from tests.conformance.cells import fresh, shake
from tests.models import output

NAMES = ("a", "b", "c")


def fused(method: Method, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Composition, Tensor]:
    """Three deltas on two linear maps, fused."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    for k, name in enumerate(NAMES):
        shake(attach(backbone, method, ["0", "2"], name=name), spread=0.5, seed=k)
    composition = compose(backbone, NAMES, "fusion", name="abc")
    return backbone.to(dtype), composition, torch.randn(2, 5, 6, dtype=dtype)


def by_hand(y: Tensor, outputs: list[Tensor], mixer: Fusion) -> Tensor:
    """The paper's attention, one token and one member at a time."""
    mixed = torch.zeros_like(y)
    for place in [(i, j) for i in range(y.shape[0]) for j in range(y.shape[1])]:
        z = [o[place] - y[place] for o in outputs]
        scores = torch.stack([(y[place] @ mixer.Q) @ (one @ mixer.K) for one in z])
        s = scores.exp() / scores.exp().sum()
        mixed[place] = y[place] + sum(weight * (one @ mixer.V) for weight, one in zip(s, z, strict=True))
    return mixed


@pytest.mark.parametrize("method", [Adapter(bottleneck_dim=3), LoRA(rank=2), IA3()], ids=str)
@torch.no_grad()
def test_the_formula(method: Method) -> None:
    backbone, composition, x = fused(method)
    for tensor in composition.mixing.state_dict().values():
        tensor.add_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype))
    first, second = composition.mixers()["0"], composition.mixers()["2"]
    assert isinstance(first, Fusion) and isinstance(second, Fusion)
    patches = {path: [entry.patch for d in composition.deltas for entry in d.entries if entry.site.path == path] for path in ("0", "2")}
    h = x
    for path, mixer in (("0", first), ("2", second)):
        layer = backbone[int(path)]
        y = F.linear(h, layer.weight, layer.bias)
        outcome = by_hand(y, [patch(h, y) for patch in patches[path]], mixer)
        h = torch.tanh(outcome) if path == "0" else outcome
    assert (backbone(x) - h).abs().max() < 1e-10


def test_fresh_it_is_close_to_the_mean_of_its_members() -> None:
    backbone, composition, x = fused(Adapter(bottleneck_dim=3))
    found = backbone(x)
    composition.dissolve()
    both = compose(backbone, NAMES, "weighted", weights=[1 / 3] * 3)
    assert torch.allclose(found, backbone(x), atol=0.02)
    assert not torch.allclose(found, backbone(x), atol=1e-7)
    assert both.mixing.state_dict() == {}


def test_sizes_and_penalty() -> None:
    _, composition, _ = fused(LoRA(rank=2))
    assert sum(parameter.numel() for group in composition.parameter_groups(0.1) for parameter in group["params"]) == 3 * (8**2 + 4**2)
    assert composition.penalty().item() == 0
    for mixer in composition.mixers().values():
        assert isinstance(mixer, Fusion)
        with torch.no_grad():
            mixer.V[0, 1] += 2
    assert composition.penalty().item() == pytest.approx(2 * 0.01 * 4)
    composition.penalty().backward()
    assert all(mixer.get_parameter("V").grad[0, 1] == pytest.approx(0.04) for mixer in composition.mixers().values())


def test_members_rest_from_training_until_it_is_dissolved() -> None:
    backbone, composition, x = fused(LoRA(rank=2))
    backbone(x).square().sum().backward()
    assert {name for name, p in composition.named_parameters() if p.grad is not None} == {
        f"mixer.{path}.{letter}" for path in "02" for letter in "QKV"
    }
    a, b, c = composition.deltas
    b.unfreeze()
    assert [name for name, p in b.named_parameters() if p.requires_grad] == [name for name, _ in b.named_parameters()]
    composition.disable()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    composition.enable()
    assert not a.trainable and b.trainable
    composition.dissolve()
    assert all(delta.trainable and all(p.requires_grad for p in delta.parameters()) for delta in (a, b, c))


def test_what_was_frozen_before_stays_frozen() -> None:
    backbone, composition, _ = fused(LoRA(rank=2))
    composition.dissolve()
    deltas(backbone)[0].freeze()
    compose(backbone, NAMES, "fusion").dissolve()
    assert [delta.trainable for delta in deltas(backbone)] == [False, True, True]


def test_a_member_that_only_has_the_head_trains() -> None:
    backbone, inputs = fresh("bert")
    for k, name in enumerate(NAMES):
        shake(attach(backbone, Adapter(bottleneck_dim=2), name=name, head=False), seed=k)
    attach(backbone, LinearProbe(), name="head")
    composition = compose(backbone, [*NAMES, "head"], "fusion")
    output(backbone, inputs).square().mean().backward()
    trained = {name.partition(".")[0] for name, parameter in composition.named_parameters() if parameter.grad is not None}
    assert trained == {"mixer", "head"}
    with pytest.raises(Unsupported, match="fusion composition weighs outputs per token"):
        attach(backbone, BitFit(), name="biases", head=False)
        composition.dissolve()
        compose(backbone, [*NAMES, "biases"], "fusion")


def test_it_learns_whom_to_ask() -> None:
    """Inputs of two kinds, each with its own expert: the attention tells them apart, which no fixed weights can."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8))
    for k, name in enumerate("ab"):
        delta = attach(backbone, LoRA(rank=2), "0", name=name)
        shake(delta, spread=1.0, seed=k)
    kind = torch.arange(64) % 2
    x = torch.randn(64, 4) + 6 * (kind[:, None] - 0.5) * torch.tensor([1.0, 0, 0, 0])
    experts = []
    for name, other in (("a", "b"), ("b", "a")):
        one, rest = (next(delta for delta in deltas(backbone) if delta.name == called) for called in (name, other))
        one.enable()
        rest.disable()
        experts.append(backbone(x).detach())
    target = torch.where(kind[:, None] == 0, experts[0], experts[1])
    composition = compose(backbone, ["a", "b"], "fusion")
    optimizer = torch.optim.Adam(composition.parameter_groups(0.02))
    losses = []
    for _ in range(200):
        loss = F.mse_loss(backbone(x), target) + composition.penalty()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_parts_of_a_fused_projection_are_mixed_in_the_whole() -> None:
    backbone, inputs = fresh("gpt2")
    for k, name in enumerate(NAMES):
        shake(attach(backbone, LoRA(rank=2), "attention.query" if name == "a" else "attention.value", name=name), seed=k)
    composition = compose(backbone, NAMES, "fusion")
    assert {len(mixer.get_parameter("Q")) for mixer in composition.mixers().values()} == {96}
    found = output(backbone, inputs)
    assert torch.equal(output(copy.deepcopy(backbone), inputs), found)
    with disabled(backbone):
        assert not torch.equal(output(backbone, inputs), found)
    composition.dissolve()
    for delta in deltas(backbone):
        detach(delta)
    assert torch.equal(output(backbone, inputs), output(fresh("gpt2")[0], inputs))


def test_there_must_be_something_to_fuse() -> None:
    backbone, _ = fresh("bert")
    attach(backbone, LoRA(rank=2), "attention.query", name="a")
    attach(backbone, LoRA(rank=2), ["attention.value", "feed_forward.up"], name="b")
    with pytest.raises(Unsupported, match="no module on which 2 of them edit what it returns"):
        compose(backbone, ["a", "b"], "fusion")
    attach(backbone, LoRA(rank=2), "feed_forward.up", name="c")
    composition = compose(backbone, NAMES, "fusion")
    assert all(path.endswith("intermediate.dense") for path in composition.mixers())


def test_convolutions_are_refused() -> None:
    backbone, _ = fresh("conv_net")
    for name in NAMES:
        attach(backbone, Adapter(bottleneck_dim=2), "conv1", name=name)
    with pytest.raises(Unsupported, match="`conv1` is a convolution; a fusion composition weighs tokens"):
        compose(backbone, NAMES, "fusion")
    assert all(delta.enabled and delta.trainable for delta in deltas(backbone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types_and_autocast(dtype: torch.dtype) -> None:
    backbone, composition, x = fused(LoRA(rank=2), torch.float32)
    expected = backbone(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(backbone(x).float(), expected, atol=0.1)
    if dtype is torch.bfloat16:
        for module in backbone:
            if isinstance(module, nn.Linear):
                module.weight.data, module.bias.data = module.weight.data.to(dtype), module.bias.data.to(dtype)
    found = backbone(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), expected, atol=0.1)
    found.float().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for mixer in composition.mixers().values() for p in mixer.parameters())


def test_it_compiles_to_one_graph() -> None:
    backbone, _, x = fused(LoRA(rank=2), torch.float32)
    expected = backbone(x)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_every_way_to_compose_is_plain_or_has_a_mixer() -> None:
    assert set(get_args(How)) == {"sequential", "parallel", "weighted"} | set(MIXERS) == set(WAYS)
