"""Diff pruning: gates, penalty, exact budgets, and its life from gates to positions and values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import DiffPruning, FullFineTuning
from deltatune.methods.specification.diff_pruning import GatedDifference, prune
from tests.conformance.cells import fresh, shake
from tests.models import output

L, R, LAMBDA = -1.5, 1.5, 0.01


def _patches(delta: Delta) -> list[GatedDifference]:
    return [patch for patch in delta.patches if isinstance(patch, GatedDifference)]


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _gate(u: Tensor, alpha: Tensor) -> Tensor:
    """z = min(1, max(0, s (r - l) + l)), s = sigmoid(log u - log(1 - u) + alpha)."""
    s = _sigmoid(torch.log(u) - torch.log(1 - u) + alpha)
    return (s * (R - L) + L).clamp(0, 1)


@pytest.mark.parametrize("structured", [False, True])
def test_the_formulas_in_double_precision(structured: bool) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    delta = attach(backbone, DiffPruning(penalty_weight=LAMBDA, alpha_init=0.3, structured=structured), "0")
    backbone.double()
    shake(delta, spread=1.5)
    backbone.train()
    found = backbone(x)
    thetas, penalty = [], torch.zeros((), dtype=torch.float64)
    for patch in _patches(delta):
        assert patch.noise.dtype == torch.float64
        z, c = _gate(patch.noise, patch.alpha), math.log(-L / R)
        expected_open = _sigmoid(patch.alpha - c)
        if structured:
            assert patch.alpha_g is not None
            z = z * _gate(patch.noise_g, patch.alpha_g)
            expected_open = expected_open * _sigmoid(patch.alpha_g - c)
        penalty = penalty + LAMBDA * expected_open.sum()
        thetas.append(backbone[0].get_parameter(patch.parameter) + z * patch.w)
    torch.testing.assert_close(found, x @ thetas[0].T + thetas[1], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(delta.penalty(), penalty, atol=1e-10, rtol=1e-10)
    gradients = torch.autograd.grad(found.square().sum() + delta.penalty(), list(delta.parameters()))
    expected = torch.autograd.grad((x @ thetas[0].T + thetas[1]).square().sum() + penalty, list(delta.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_evaluation_takes_the_median() -> None:
    backbone = nn.Sequential(nn.Linear(6, 5)).eval()
    delta = attach(backbone, DiffPruning(alpha_init=0.3), "0")
    shake(delta, spread=1.0)
    x = torch.randn(3, 6)
    W, b = (backbone[0].get_parameter(p.parameter) + _gate(torch.full_like(p.alpha, 0.5), p.alpha) * p.w for p in _patches(delta))
    torch.testing.assert_close(backbone(x), x @ W.T + b)
    assert torch.equal(backbone(x), backbone(x))


def test_one_draw_a_forward_whoever_reads_it() -> None:
    """A tied weight is read twice, and every reader must see the same gates; the next forward has others."""
    backbone, inputs = fresh("tied_mlp")
    backbone.train()
    delta = attach(backbone, DiffPruning(alpha_init=0.0), "first")
    shake(delta, spread=0.5)
    seen: list[Tensor] = []
    for module in (backbone.get_submodule("first"), backbone.get_submodule("second")):
        module.register_forward_pre_hook(lambda module, _: seen.append(module._parameters["weight"].detach().clone()))
    first, second = output(backbone, inputs), output(backbone, inputs)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(first, second)


def test_uniform_draws_stay_away_from_the_ends() -> None:
    patch = GatedDifference("weight", torch.zeros(300, 300), DiffPruning())
    patch.draw()
    assert 0 < float(patch.noise.min()) < 1e-3
    assert 1 - 1e-3 < float(patch.noise.max()) < 1
    assert abs(float(patch.noise.mean()) - 0.5) < 0.01
    assert _gate(patch.noise, torch.zeros(300, 300)).isfinite().all()


@pytest.mark.parametrize("density", [0.003, 0.05, 0.5, 1.0])
def test_the_budget_is_exact_over_all_parameters(density: float) -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, DiffPruning(density=density))
    shake(delta)
    total = sum(patch.w.numel() for patch in _patches(delta))
    magnitudes = torch.cat([patch.difference().abs().flatten() for patch in _patches(delta)])
    delta.method.enter(delta.patches, "fine-tune")  # type: ignore[attr-defined]
    kept = torch.cat([patch.mask.flatten() for patch in _patches(delta)])
    assert int(kept.sum()) == round(density * total)
    assert magnitudes[kept].min() >= (magnitudes[~kept].max() if not kept.all() else 0)
    assert all(int((patch.w != 0).sum()) <= int(patch.mask.sum()) for patch in _patches(delta))


def test_ties_fall_to_the_earlier_entry() -> None:
    patches = [GatedDifference("weight", torch.zeros(2, 3), DiffPruning()) for _ in range(2)]
    with torch.no_grad():
        for patch in patches:
            patch.w.fill_(0.25)
        patches[1].w[1, 2] = -7.0
    prune(patches, density=5 / 12)
    assert patches[0].mask.flatten().tolist() == [True, True, True, True, False, False]
    assert patches[1].mask.flatten().tolist() == [False] * 5 + [True]
    prune([fresh_patch := GatedDifference("bias", torch.zeros(4), DiffPruning())], density=0.01)
    assert fresh_patch.mask.sum() == 1


def test_life_from_gates_to_positions_and_values() -> None:
    """train w and alpha; prune; train w under the mask; export: the outputs stay, the file shrinks."""
    backbone, inputs = fresh("bert")
    recipe = DiffPruning(density=0.02, penalty_weight=1e-4, alpha_init=1.0)
    delta = attach(backbone, recipe, "attention.{query,value}", head=False)
    assert [phase.name for phase in recipe.phases] == ["gate", "fine-tune"]
    assert sum(phase.share for phase in recipe.phases) == 1
    before = delta.budget()
    _train(backbone, inputs, delta, 3)
    assert all(parameter.grad is not None for parameter in delta.trained_parameters().values())
    assert float(delta.penalty().detach()) > 0

    recipe.enter(delta.patches, "fine-tune")
    assert float(delta.penalty().detach()) == 0.0
    with torch.no_grad():
        at_pruning = output(backbone, inputs)
    frozen = {name: p.clone() for name, p in delta.named_parameters() if name.endswith("alpha")}
    _train(backbone, inputs, delta, 3)
    assert all(torch.equal(delta_parameter, frozen[name]) for name, delta_parameter in delta.named_parameters() if name in frozen)
    masks = [patch.mask.clone() for patch in _patches(delta)]
    differences = [patch.difference() for patch in _patches(delta)]
    assert all(not difference[~mask].any() for difference, mask in zip(differences, masks, strict=True))
    with torch.no_grad():
        backbone.eval()
        trained = output(backbone, inputs)
        assert not torch.equal(trained, at_pruning)
        assert not recipe.is_exported(delta.patches)
        recipe.export(delta.patches, delta.shared)
        assert recipe.is_exported(delta.patches)
        assert torch.allclose(output(backbone, inputs), trained, atol=1e-6)
    kept = sum(int(mask.sum()) for mask in masks)
    total = sum(mask.numel() for mask in masks)
    assert kept == round(0.02 * total)
    assert delta.budget().delta == kept
    assert delta.budget().size_bytes == kept * (4 + 4) < before.size_bytes / 20
    assert sorted(name.rpartition(".")[2] for name in delta.state_dict()) == sorted(["index", "values"] * len(masks))


def test_an_early_stop_is_pruned_when_exported() -> None:
    backbone, inputs = fresh("tied_mlp")
    recipe = DiffPruning(density=0.1)
    delta = attach(backbone, recipe)
    shake(delta)
    recipe.export(delta.patches, None)
    assert delta.budget().delta == round(0.1 * sum(parameter.numel() for parameter in fresh("tied_mlp")[0].parameters()))
    assert output(backbone, inputs).isfinite().all()


def test_gates_have_their_own_rate() -> None:
    backbone, _ = fresh("tied_mlp")
    delta = attach(backbone, DiffPruning(structured=True, alpha_learning_rate=0.7))
    rest, gates = delta.parameter_groups(lr=0.01)
    assert (rest["lr"], gates["lr"], gates["weight_decay"]) == (0.01, 0.7, 0.0)
    assert {id(p) for p in gates["params"]} == {id(p) for name, p in delta.named_parameters() if "alpha" in name}
    assert len(rest["params"]) + len(gates["params"]) == len(delta.trained_parameters())


def test_a_head_trains_in_full_and_is_not_penalised() -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, DiffPruning(penalty_weight=1.0, alpha_init=50.0))
    gated = sum(patch.w.numel() for patch in _patches(delta))
    head = sum(parameter.numel() for parameter in backbone.get_submodule("classifier").parameters())
    assert abs(float(delta.penalty().detach()) / gated - 1) < 1e-5
    assert gated + head == sum(parameter.numel() for parameter in fresh("bert")[0].parameters())


def _train(backbone: nn.Module, inputs: dict[str, Tensor], delta: Delta, steps: int) -> None:
    backbone.train()
    optimizer = torch.optim.SGD(delta.parameter_groups(lr=0.5))
    for _ in range(steps):
        optimizer.zero_grad()
        (output(backbone, inputs).square().mean() + delta.penalty()).backward()
        optimizer.step()
    backbone.eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(density=0.0), r"DiffPruning\(density=0\.0\) was asked for; `density` must be greater than 0 and at most 1"),
        (dict(density=1.5), r"`density` must be greater than 0 and at most 1"),
        (dict(fine_tune_share=1.0), r"`fine_tune_share` must be at least 0 and less than 1"),
    ],
)
def test_fields_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        DiffPruning(**fields)


@pytest.mark.parametrize("phase", ["gate", "fine-tune"])
def test_all_entries_equal_full_fine_tuning(phase: str) -> None:
    """At 100% with every gate open, w walks as theta does in full fine-tuning: the same losses, step by step."""
    losses: dict[str, list[Tensor]] = {}
    for method in (DiffPruning(density=1.0, penalty_weight=0.0, alpha_init=40.0), FullFineTuning()):
        backbone, inputs = fresh("bert")
        backbone.double().eval()
        delta = attach(backbone, method)
        backbone.double()
        if isinstance(method, DiffPruning):
            method.enter(delta.patches, phase)
        moving = [parameter for name, parameter in delta.named_parameters() if not name.endswith("alpha")]
        assert sum(parameter.numel() for parameter in moving) == delta.budget().N
        optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.0)
        run = losses.setdefault(type(method).__name__, [])
        for _ in range(6):
            optimizer.zero_grad()
            loss = output(backbone, inputs).square().mean()
            loss.backward()
            optimizer.step()
            run.append(loss.detach())
    mine, theirs = torch.stack(losses["DiffPruning"]), torch.stack(losses["FullFineTuning"])
    assert theirs[-1] < 0.5 * theirs[0]
    torch.testing.assert_close(mine, theirs, atol=0, rtol=1e-9)
