"""Inputs of adapted modules, made anew in the backward: equal bits for less memory, and nothing where somebody else decides."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deltatune as dt
from deltatune.errors import InvalidValue
from deltatune.injection.formulas import Kept
from deltatune.injection.recompute import Anew, Keeper
from deltatune.methods import IA3, DiffPruning, DoRA, LoRA, Method, ParallelAdapter
from deltatune.training.live import live_tensors
from tests.models import FEED_FORWARD, HIDDEN, MODELS, output

LINEARS = ["attention.*", "feed_forward.*"]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Kept | Anew]]:
    """What the hooks were given, and what they saved for it."""
    found: list[tuple[Tensor, Kept | Anew]] = []
    own = Keeper.pack

    def pack(self: Keeper, x: Tensor) -> Kept | Anew:
        saved = own(self, x)
        found.append((x.detach(), saved))
        return saved

    monkeypatch.setattr(Keeper, "pack", pack)
    return found


def anew(packed: list[tuple[Tensor, Kept | Anew]]) -> list[Anew]:
    return [saved for _, saved in packed if isinstance(saved, Anew)]


def shaken(module: nn.Module, method: Method, where: Any = None) -> nn.Module:
    torch.manual_seed(1)
    delta = dt.attach(module, method, where)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def step(backbone: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    torch.manual_seed(2)
    loss = output(backbone, inputs).float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) > 1
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def both(backbone: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A step that keeps, and one that makes anew."""
    plain = step(backbone, inputs)
    dt.recompute(backbone)
    return plain, step(backbone, inputs)


def test_what_is_made_anew_does_not_live_from_forward_to_backward() -> None:
    backbone, inputs = MODELS["bert"]()
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    shaken(backbone.train(), LoRA(rank=2), LINEARS)

    def lived() -> int:
        with live_tensors() as live:
            before = live.bytes
            loss = output(backbone, inputs).sum()
            return live.bytes - before + 0 * loss.numel()

    kept = lived()
    dt.recompute(backbone)
    lived()  # the first time it also compares
    # what the activation of each layer gives, and what the norms give to the maps: not the embeddings' one, nor the last
    assert kept - lived() == 4 * inputs["input_ids"].numel() * (2 * FEED_FORWARD + 3 * HIDDEN)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("bert", {"NativeLayerNorm", "Gelu"}),
        ("opt", {"NativeLayerNorm"}),
        ("t5", {"Mul"}),
        ("llama", {"Mul"}),
        ("gpt2", {"NativeLayerNorm", "Mul"}),
        ("gemma3", {"Mul"}),
    ],
)
def test_whole_models_to_the_bit(name: str, functions: set[str], dropout: float, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    backbone, inputs = MODELS[name]()
    for module in backbone.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout  # type: ignore[assignment]
    shaken(backbone, LoRA(rank=2), LINEARS)
    plain, found = both(backbone, inputs)
    same(found, plain)
    assert functions <= {saved.formula.names.partition("Backward")[0] for saved in anew(packed)}


@pytest.mark.parametrize("method", [IA3(), LoRA(rank=2, dropout=0.2), ParallelAdapter(bottleneck_dim=2), DoRA(rank=2), DiffPruning()])
def test_every_way_of_reading_x_gains(method: Method, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    backbone, inputs = MODELS["bert"]()
    shaken(backbone.train(), method, "feed_forward.down" if not isinstance(method, ParallelAdapter) else None)
    plain, found = both(backbone, inputs)
    same(found, plain)
    assert anew(packed)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu6": F.relu6,
    "leaky relu": lambda u: F.leaky_relu(u, 0.2),
    "elu": lambda u: F.elu(u, 0.7),
    "selu": F.selu,
    "celu": lambda u: F.celu(u, 0.7),
    "softplus": lambda u: F.softplus(u, 2.0),
    "square": torch.square,
    "squared relu": lambda u: F.relu(u).square(),
    "quick gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "gate": lambda u: F.silu(u) * (u + 1),
    "scaled": lambda u: F.relu(u) * 3.0,
    "divided": lambda u: F.gelu(u) / 3.0,
    "dropout": lambda u: F.dropout(F.relu(u), 0.3),
    "fused dropout": lambda u: torch.native_dropout(F.gelu(u), 0.3, True)[0],
    "flattened": lambda u: F.gelu(u).flatten(0, 1),
    "transposed": lambda u: F.gelu(u.transpose(0, 1)),
    "layer norm": lambda u: F.layer_norm(u, (6,), torch.linspace(1, 2, 6), torch.linspace(0, 1, 6)),
    "bare layer norm": lambda u: F.layer_norm(u, (6,)),
    "layer norm without bias": lambda u: F.layer_norm(u, (6,), torch.linspace(1, 2, 6)),
    "rms norm": lambda u: F.rms_norm(u, (6,), torch.linspace(1, 2, 6)),
}


class Between(nn.Module):
    """Two maps with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 6), nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))  # type: ignore[no-any-return]


def between(function: Callable[[Tensor], Tensor], where: str = "*") -> tuple[Between, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = Between(function)
    shaken(module, LoRA(rank=2), where)
    return module, {"x": torch.randn(3, 5, 6)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_function(name: str, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(ACTIVATIONS[name])
    plain, found = both(module, inputs)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert len(anew(packed)) == 1


@pytest.mark.parametrize(
    "function",
    [F.relu, torch.tanh, lambda u: F.gelu(u) + 1, lambda u: F.gelu(u).detach(), lambda u: F.relu(u).view(15, 6), F.hardshrink],
    ids=["relu", "tanh", "sum", "cut", "view of relu", "unlisted"],
)
def test_what_is_kept_anyway_or_not_listed_stays(function: Callable[[Tensor], Tensor], packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(function)
    plain, found = both(module, inputs)
    same(found, plain)
    assert packed and not anew(packed)


def written_over(u: Tensor) -> Tensor:
    x = F.gelu(u)
    with torch.no_grad():
        x.clamp_(min=0.0)
    return x


def written_over_unseen(u: Tensor) -> Tensor:
    x = F.gelu(u)
    x.data.clamp_(min=0.0)
    return x


@pytest.mark.parametrize("function", [written_over, written_over_unseen, lambda u: F.silu(u, inplace=True), lambda u: F.gelu(u).mul_(2.0)])
def test_what_was_changed_in_place_is_kept(function: Callable[[Tensor], Tensor], packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(function)
    plain, found = both(module, inputs)
    same(found, plain)
    assert packed and not anew(packed)


@pytest.mark.parametrize("change", ["x", "weight"])
def test_a_change_before_the_backward_is_an_error_or_harmless(change: str) -> None:
    made: list[Tensor] = []
    module, inputs = between(lambda u: made.append(F.gelu(u)) or made[-1])  # type: ignore[func-returns-value]
    plain = step(module, inputs)
    dt.recompute(module)
    torch.manual_seed(2)
    loss = output(module, inputs).float().square().mean()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if change == "x":  # keeping it would be an error
        made[-1].detach().zero_()
        same([loss.detach(), *torch.autograd.grad(loss, trained)], plain)
    else:
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_function_that_was_freed_is_an_error() -> None:
    made: list[Tensor] = []
    module, inputs = between(lambda u: made.append(F.gelu(u)) or made[-1], "second")  # type: ignore[func-returns-value]
    dt.recompute(module)
    inputs["x"].requires_grad_()
    loss = module(**inputs).sum()
    made[-1].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [parameter for parameter in module.parameters() if parameter.requires_grad])


def test_gradients_of_gradients() -> None:
    module, inputs = between(F.gelu)
    x = inputs["x"].requires_grad_()

    def twice() -> list[Tensor]:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        [first] = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), trained))

    plain = twice()
    dt.recompute(module)
    for a, b in zip(twice(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    first, second = between(F.gelu)[0], between(F.gelu)[0]
    x = torch.randn(3, 5, 6, requires_grad=True)

    def run() -> list[Tensor]:
        module.zero_grad()
        y = F.gelu(checkpoint(module.a, x, use_reentrant=reentrant))
        checkpoint(module.b, y, use_reentrant=reentrant).square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]

    for one in (first, second):
        dt.detach(dt.deltas(one)[0])
    module = nn.Module()
    module.a, module.b = first, second
    shaken(module, LoRA(rank=2), "*")
    plain = run()
    dt.recompute(module)
    same(run(), plain)
    assert bool(anew(packed)) == reentrant


def test_other_peoples_hooks_see_everything(packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(F.gelu)
    dt.recompute(module)
    seen: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):  # type: ignore[func-returns-value]
        output(module, inputs).sum().backward()
    assert seen and not packed


def test_what_was_made_behind_other_peoples_hooks_is_not_unpacked_twice(packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    def offloaded(u: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: [x], lambda box: box.pop()):  # as checkpointing, good for one reading
            return F.gelu(u)

    module, inputs = between(offloaded)
    dt.recompute(module)
    output(module, inputs).sum().backward()
    assert packed and not anew(packed)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_modules_with_hooks_of_others_are_left_alone(kind: str, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(F.gelu)
    dt.recompute(module)
    getattr(module.second, kind)(lambda *_: None)
    output(module, inputs).sum().backward()
    assert packed and not anew(packed)


def test_transforms_and_forwards_without_gradients(packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    module, inputs = between(F.gelu)
    dt.recompute(module)
    with torch.no_grad():
        module(**inputs)
    each = torch.func.vmap(torch.func.grad(lambda x: module(x).square().sum()))(inputs["x"])
    assert not packed
    x = inputs["x"].requires_grad_()
    [whole] = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    module, inputs = between(F.gelu)
    plain = step(module, inputs)
    dt.recompute(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(2)
    loss = compiled(**inputs).square().mean()
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)]
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast(packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    backbone, inputs = MODELS["bert"]()
    shaken(backbone.train(), LoRA(rank=2), LINEARS)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = both(backbone, inputs)
    same(found, plain)
    assert anew(packed)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_half_precision(name: str, packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    """Activations and products run again, to the bit; a layer norm whose moments were rounded is kept."""
    backbone, inputs = MODELS[name]()
    shaken(backbone.train().bfloat16(), LoRA(rank=2), LINEARS)
    plain, found = both(backbone, inputs)
    same(found, plain)
    assert anew(packed)
    assert not any("LayerNorm" in saved.formula.names for saved in anew(packed))


def test_nothing_is_left_behind() -> None:
    module, inputs = between(F.gelu)
    dt.recompute(module)
    module.second.forward = lambda x: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ZeroDivisionError):
        module(**inputs)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    module.second.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        module(**inputs)
    del module.second.forward
    module(**inputs)  # which takes away what that has left
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    [delta] = dt.deltas(module)
    dt.detach(delta)
    with pytest.raises(InvalidValue, match="Attach or load first"):
        dt.recompute(module)


def test_copies_and_pickles_go_on(packed: list[tuple[Tensor, Kept | Anew]]) -> None:
    backbone = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    shaken(backbone, LoRA(rank=2), ["0", "2"])
    dt.recompute(backbone)
    for number, other in enumerate((copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))), 1):
        other(torch.ones(2, 6)).sum().backward()
        assert len(anew(packed)) == number
        dt.recompute(other, False)
    backbone(torch.ones(2, 6)).sum().backward()
    assert len(anew(packed)) == 3
