"""AdapterDrop: which layers keep their adapters, when, and at what cost; and one adapter for all layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import Adapter, AdapterDrop
from deltatune.methods.addition.adapter_drop import Common
from tests.conformance.cells import fresh, shake
from tests.methods.test_budgets import t5_base
from tests.models import output


def common_of(delta: Delta) -> Common:
    assert isinstance(delta.shared, Common)
    return delta.shared


def changed_layers(backbone: nn.Module, inputs: dict[str, Tensor], delta: Delta) -> list[bool]:
    """Of each layer of BERT: whether the delta changes what its feed-forward network adds to the residual."""
    downs = [module for name, module in backbone.named_modules() if name.endswith("output.dense") and "attention" not in name]
    seen: list[bool] = []

    def compare(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        seen.append(not torch.equal(y, nn.functional.linear(args[0], module.weight, module.bias)))  # type: ignore[arg-type]

    handles = [down.register_forward_hook(compare) for down in downs]
    output(backbone, inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_the_formula_is_houlsbys_above_layer_k() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdapterDrop(bottleneck_dim=4, drop_layers=1), head=False)
    shake(delta, spread=0.3)
    other, _ = fresh("bert")
    adapter = attach(other, Adapter(bottleneck_dim=4), layers=1, head=False)
    adapter.load_state_dict(delta.state_dict())
    assert torch.equal(output(backbone, inputs), output(other, inputs))
    assert {entry.site.layer for entry in delta.entries} == {1}


@pytest.mark.parametrize(("layers", "kept"), [(2, 2), (6, 4), (12, 7)])
def test_five_of_twelve_layers_are_dropped_unless_told_otherwise(layers: int, kept: int) -> None:
    backbone = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))})
    delta = attach(backbone, AdapterDrop(bottleneck_dim=2), "*")
    assert sorted({entry.site.layer for entry in delta.entries}) == list(range(layers - kept, layers))


def test_nothing_below_layer_k_needs_a_backward() -> None:
    backbone, inputs = fresh("bert")
    attach(backbone, AdapterDrop(bottleneck_dim=4, drop_layers=1), head=False)
    hidden = backbone.bert(**inputs, output_hidden_states=True).hidden_states  # type: ignore[operator]
    assert [state.requires_grad for state in hidden] == [False, False, True]


def test_the_share_of_compacters_table() -> None:
    """Karimi Mahabadi et al., table 2: 0.494% of T5-base against 0.832%, with the norms; no adapter behind cross-attention."""
    where = ["attention.output", "!cross_attention.output", "feed_forward.down"]
    backbone = t5_base()
    budget = attach(backbone, AdapterDrop(bottleneck_dim=24), where, head=False).budget()
    norms = sum(parameter.numel() for name, parameter in backbone.named_parameters() if "layer_norm" in name)
    assert budget.delta == 2 * 7 * 2 * (2 * 768 * 24 + 24 + 768)
    assert (budget.delta + norms) / budget.N == pytest.approx(0.00494, abs=3e-5)


def test_k_is_drawn_in_training_and_fixed_in_evaluation() -> None:
    torch.manual_seed(0)
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdapterDrop(bottleneck_dim=4, drop_layers=1, random=True), head=False)
    shake(delta, spread=0.3)
    assert changed_layers(backbone, inputs, delta) == [False, True]
    common_of(delta).drop_layers = 0
    assert changed_layers(backbone, inputs, delta) == [True, True]
    common_of(delta).drop_layers = 1
    backbone.train()
    drawn: list[int] = []
    for _ in range(12):
        found = changed_layers(backbone, inputs, delta)
        k = int(common_of(delta).k)
        assert found == [layer >= k for layer in range(2)]
        drawn.append(k)
    assert set(drawn) == {0, 1}


def test_gradients_of_a_random_k_are_those_of_the_layers_that_stay() -> None:
    torch.manual_seed(1)
    backbone, inputs = fresh("bert")
    delta = attach(backbone, AdapterDrop(bottleneck_dim=4, drop_layers=1, random=True), head=False)
    shake(delta, spread=0.3)
    backbone.train()
    for _ in range(6):
        backbone.zero_grad()
        output(backbone, inputs).square().sum().backward()
        k = int(common_of(delta).k)
        for entry in delta.entries:
            assert entry.site.layer is not None
            gradients = [parameter.grad for parameter in entry.patch.parameters()]
            assert all(gradient is not None and bool(gradient.any()) == (entry.site.layer >= k) for gradient in gradients)


def test_a_repeated_forward_sees_its_own_k() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    backbone = nn.ModuleDict({"linear": linear})
    backbone.forward = lambda x: checkpoint(linear, x, use_reentrant=False)  # type: ignore[method-assign]
    delta = attach(backbone, AdapterDrop(bottleneck_dim=2, drop_layers=0, random=True), "linear")
    shake(delta)
    backbone.train()
    x = torch.randn(3, 4, requires_grad=True)
    backbone(x).sum().backward()
    first, second = backbone(x), backbone(x)
    with pytest.raises(Unsupported, match="asked to repeat one of 2 forwards"):
        (first + second).sum().backward()


def test_one_adapter_for_all_layers(tmp_path: Path) -> None:
    backbone, inputs = fresh("t5")
    method = AdapterDrop(bottleneck_dim=4, drop_layers=0, shared=True)
    delta = attach(backbone, method, head=False)
    one = 2 * 32 * 4 + 4 + 32
    assert delta.budget().delta == 5 * one  # encoder: attention, feed-forward; decoder: self, cross, feed-forward
    assert sum(len(list(entry.patch.parameters())) for entry in delta.entries) == 0
    shake(delta, spread=0.3)
    alike, _ = fresh("t5")
    apart = attach(alike, Adapter(bottleneck_dim=4), head=False)
    state = delta.state_dict()
    for entry in apart.entries:
        place = f"shared.adapters.{entry.site.role}_32".replace(f"{entry.site.role}", f"{entry.site.role}".replace(".", "_"))
        entry.patch.load_state_dict({name: state[f"{place}.{name.removeprefix('bottleneck.')}"] for name in entry.patch.state_dict()})
    expected = output(alike, inputs)
    torch.testing.assert_close(output(backbone, inputs), expected)
    copied = copy.deepcopy(backbone)
    save(delta, tmp_path / "one", unfinished=True)
    loaded, _ = fresh("t5")
    load(loaded, tmp_path / "one")
    shake(delta, seed=9)
    for other in (copied, loaded):
        torch.testing.assert_close(output(other, inputs), expected)
    output(backbone, inputs).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in delta.parameters())


def test_some_layer_must_stay() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(InvalidValue, match=r"AdapterDrop\(drop_layers=5\) was asked for on 2 layers, .* Drop at most 1\."):
        attach(backbone, AdapterDrop(drop_layers=5))
    for fields in (dict(drop_layers=-1), dict(bottleneck_dim=0), dict(activation="mish")):
        with pytest.raises(InvalidValue, match=rf"AdapterDrop\({next(iter(fields))}=.*\) was asked for"):
            AdapterDrop(**fields)  # type: ignore[arg-type]
