"""The lean way of a low-rank change gives what the plain way gives, and leaves alone what others may see."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import deltatune as dt
from deltatune.injection.fused import Fused
from deltatune.injection.lean import Lean, Shrink
from deltatune.methods import AdaLoRA, BitFit, LoRA, LoRAFA, Method
from deltatune.training.borrowed import recomputing
from tests.models import MODELS, output


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """What a function gives where nothing runs leanly."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Lean, "factors", lambda *_: None)
            return function()

    return run


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each lean call with gradients."""
    calls: list[int] = []
    for function in (Shrink, Fused):
        own = function.forward
        monkeypatch.setattr(function, "forward", staticmethod(lambda *args, own=own: calls.append(1) or own(*args)))
    return calls


def shaken(module: nn.Module, method: Method, where: Any) -> dt.Delta:
    torch.manual_seed(1)
    delta = dt.attach(module, method, where)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    y = module(x)
    return y.detach().clone(), list(torch.autograd.grad(y.square().sum(), [x, *trained]))


def equal(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [LoRA(rank=3), LoRA(rank=2, rank_stabilized=True), AdaLoRA()], ids=str)
@pytest.mark.parametrize(
    "kind", [lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: Conv1D(5, 6)], ids=["linear", "bare", "conv1d"]
)
def test_it_equals_the_plain_way(kind: Callable[[], nn.Module], method: Method, count: list[int], plainly: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(kind())
    shaken(module, method, "0")
    x = torch.randn(2, 4, 6, requires_grad=True)
    found = gradients(module, x)
    assert count == [1]
    equal(found, plainly(lambda: gradients(module, x)))
    assert count == [1]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_whole_models(name: str, plainly: Callable[..., Any]) -> None:
    backbone, inputs = MODELS[name]()
    delta = shaken(backbone, LoRA(rank=2), ["attention.*", "feed_forward.*"])
    backbone.double()

    def run() -> list[Tensor]:
        backbone.zero_grad()
        y = output(backbone, inputs)
        y.square().mean().backward()
        return [y.detach().clone(), *(parameter.grad.clone() for parameter in delta.parameters() if parameter.grad is not None)]

    found = run()
    assert len(found) > 10
    for one, other in zip(found, plainly(run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_an_input_without_gradient_asks_for_none_of_the_weight() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    delta = shaken(module, LoRA(rank=1), "0")
    y = module(torch.randn(2, 4))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters()) and module[0].weight.grad is None


def test_an_activation_may_work_in_place_behind_it(count: list[int], plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True))
    shaken(module, LoRA(rank=2), ["0", "2"])
    module.double()
    for tokens in (1, 9):  # not folded, and folded
        x = torch.randn(2, tokens, 4, dtype=torch.float64, requires_grad=True)
        equal(gradients(module, x), plainly(lambda x=x: gradients(module, x)))
    assert len(count) == 4


def test_what_another_hook_keeps_stays_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    kept: list[Tensor] = []
    module[0].register_forward_hook(lambda _, __, y: kept.append(y))
    x = torch.randn(2, 4)
    plain = module(x).clone()
    shaken(module, LoRA(rank=1), "0")
    changed = module(x)
    assert torch.equal(kept[1], plain) and not torch.allclose(changed, plain)


def test_a_backward_hook_sees_the_whole_gradient(plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1), "0")
    seen: list[Tensor] = []
    module[0].register_full_backward_hook(lambda _, given, __: seen.append(given[0].clone()))
    x = torch.randn(2, 4, requires_grad=True)
    [gradient] = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(seen[0], gradient)


def test_gradients_of_gradients(count: list[int], plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    shaken(module, LoRA(rank=2), ["0", "2"])
    x = torch.randn(3, 4, requires_grad=True)

    def twice() -> list[Tensor]:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        [first] = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), trained))

    found = twice()
    assert len(count) == 2
    for one, other in zip(found, plainly(twice), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, count: list[int], plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    delta = shaken(module, LoRA(rank=2), ["0", "2"])
    x = torch.randn(3, 4, requires_grad=True)

    def run() -> list[Tensor]:
        module.zero_grad()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        return [parameter.grad.clone() for parameter in delta.parameters() if parameter.grad is not None]

    found = run()
    assert count
    for one, other in zip(found, plainly(run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_transforms_run_plainly(count: list[int], plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    delta = shaken(module, LoRA(rank=1), "0")
    x = torch.randn(5, 4)
    trained = dict(delta.named_parameters())

    def loss(x: Tensor) -> Tensor:
        return module(x).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    x.requires_grad_()
    [whole] = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(each, whole)
    assert trained and len(count) == 1


def test_autocast_keeps_to_its_precision(count: list[int]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1), "0")
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 4, requires_grad=True)).dtype == torch.bfloat16
    assert not count


def test_dropout_and_several_deltas_run_plainly(count: list[int]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1, dropout=0.5), "0")
    x = torch.randn(2, 4, requires_grad=True)
    module.train()(x)
    assert not count
    module.eval()(x)
    assert len(count) == 1
    shaken(module, LoRA(rank=1), "0")
    module(x)
    assert len(count) == 1


def test_copies_and_pickles(plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1), "0")
    x = torch.randn(2, 4, requires_grad=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        equal(gradients(module, x), gradients(other, x))


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many maps each fused call served, and whether it folded them."""
    calls: list[tuple[int, bool]] = []
    own = Fused.forward
    monkeypatch.setattr(
        Fused, "forward", staticmethod(lambda ctx, x, folded, s, *rest: calls.append((len(s), folded)) or own(ctx, x, folded, s, *rest))
    )
    return calls


def trained(backbone: nn.Module, delta: dt.Delta, inputs: dict[str, Tensor]) -> list[Tensor]:
    backbone.zero_grad()
    y = output(backbone, inputs)
    y.square().mean().backward()
    return [y.detach().clone(), *(parameter.grad.clone() for parameter in delta.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(("name", "expected"), [("bert", [3, 1, 1, 1]), ("llama", [3, 1, 2, 1]), ("t5", None)])
@pytest.mark.parametrize("folded", [True, False])
def test_maps_of_one_input_go_together(
    name: str,
    expected: list[int] | None,
    folded: bool,
    widths: list[tuple[int, bool]],
    plainly: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, inputs = MODELS[name]()
    if folded:  # as if there were tokens enough
        monkeypatch.setattr("deltatune.injection.fused.Operands.widest", property(lambda self: 1))
    delta = shaken(backbone, LoRA(rank=2), ["attention.*", "feed_forward.*"] + (["cross_attention.*"] if name == "t5" else []))
    backbone.double()
    found = trained(backbone, delta, inputs)
    if expected is not None:
        served = [number for number, _ in widths]
        assert served == (expected * 2 if folded else [number for number in expected if number > 1] * 2)
    assert {way for _, way in widths} == {folded}
    for one, other in zip(found, plainly(lambda: trained(backbone, delta, inputs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_checkpointed_layers_go_together(widths: list[tuple[int, bool]], plainly: Callable[..., Any]) -> None:
    backbone, inputs = MODELS["bert"]()
    delta = shaken(backbone, LoRA(rank=2), "attention.*")
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    backbone.double()
    with recomputing(backbone):
        found = trained(backbone, delta, inputs)
    assert len(widths) > 2 and (3, False) in widths
    for one, other in zip(found, plainly(lambda: trained(backbone, delta, inputs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def attention(method: Method) -> Any:
    """The first attention of a BERT, with a change at each of its projections."""
    backbone, _ = MODELS["bert"]()
    shaken(backbone, method, "attention.{query,key,value}")
    backbone.double()
    return backbone.bert.encoder.layer[0].attention.self


def test_one_of_them_given_something_else_runs_alone(widths: list[tuple[int, bool]], plainly: Callable[..., Any]) -> None:
    layer = attention(LoRA(rank=2))
    x, other = (torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run() -> list[Tensor]:
        y = layer.query(x) * layer.key(x) + layer.value(other)
        mine = [p for part in (layer.query, layer.key, layer.value) for p in part.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, other, *mine])]

    found, again = run(), run()
    assert widths == [(3, False), (2, False)]
    for one, two, plain in zip(found, again, plainly(run), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(two, plain, rtol=1e-8, atol=1e-10)


def test_an_input_that_changes_in_between_is_read_anew(plainly: Callable[..., Any]) -> None:
    layer = attention(LoRA(rank=2))
    start = torch.randn(2, 3, 32, dtype=torch.float64)

    def run() -> Tensor:
        x = start.clone()
        first = layer.query(x).detach()
        x.mul_(2.0)
        return first + layer.value(x).detach()

    torch.testing.assert_close(run(), plainly(run), rtol=1e-8, atol=1e-10)


def test_only_one_of_the_outputs_is_used(plainly: Callable[..., Any]) -> None:
    layer = attention(LoRA(rank=2))
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        layer.query(x)
        y = layer.key(x)
        mine = [p for p in layer.key.parameters() if p.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), [x, *mine]))

    for one, other in zip(run(), plainly(run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_fixed_factor_keeps_the_small_product_only(tokens: int, widths: list[tuple[int, bool]], plainly: Callable[..., Any]) -> None:
    layer = attention(LoRAFA(rank=2))
    x = torch.randn(1, tokens, 32, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        y = layer.query(x) + layer.key(x) + layer.value(x)
        mine = [p for part in (layer.query, layer.key, layer.value) for p in part.parameters() if p.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), [x, *mine]))

    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        (layer.query(x) + layer.key(x) + layer.value(x)).sum()
    assert widths and x.data_ptr() not in kept
    for one, other in zip(run(), plainly(run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_bias_that_trains_beside_it(widths: list[tuple[int, bool]], plainly: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1), "0")
    dt.attach(module, BitFit(), "0", name="bias")
    x = torch.randn(9, 4, requires_grad=True)
    found = gradients(module, x)
    assert widths == [(1, True)] and len(found[1]) == 4
    equal(found, plainly(lambda: gradients(module, x)))


def test_gradients_of_gradients_of_maps_of_one_input(widths: list[tuple[int, bool]], plainly: Callable[..., Any]) -> None:
    layer = attention(LoRA(rank=2))
    x = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)

    def twice() -> list[Tensor]:
        y = (layer.query(x) * layer.key(x)).tanh() + layer.value(x)
        [first] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        mine = [p for part in (layer.query, layer.key, layer.value) for p in part.parameters() if p.requires_grad]
        return list(torch.autograd.grad(first.square().sum(), mine))

    found = twice()
    assert widths == [(3, True)]
    for one, other in zip(found, plainly(twice), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_hook_ahead_of_the_map_sees_what_it_is_given(widths: list[tuple[int, bool]]) -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    shaken(module, LoRA(rank=1), "0")
    seen: list[Tensor] = []
    module[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(torch.randn(9, 4))
    assert seen[0].shape == (9, 4) and not widths
