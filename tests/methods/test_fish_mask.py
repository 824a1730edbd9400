"""FISH mask: squared gradients one example at a time, the largest of all, and training at those positions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import FISHMask
from deltatune.methods.specification.fish_mask import fisher
from deltatune.methods.specification.sparse import SparseDifference
from deltatune.training.life import Life
from tests.conformance.cells import fresh, shake
from tests.models import LABELS, VOCABULARY, output


def _patches(delta: Delta) -> dict[str, SparseDifference]:
    return {entry.key: entry.patch for entry in delta.entries if isinstance(entry.patch, SparseDifference)}


def _batches(count: int = 3, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(5, VOCABULARY, (rows, 9), generator=generator)
        labels = torch.randint(LABELS, (rows,), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _fisher_by_hand(names: list[str], samples: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    backbone, _ = fresh("bert")
    backbone.to(dtype)
    rows = [{name: value[k : k + 1] for name, value in batch.items()} for batch in _batches() for k in range(4)]
    sums = {name: torch.zeros_like(backbone.get_parameter(name)) for name in names}
    for row in rows[:samples]:
        backbone.zero_grad()
        backbone(**row).loss.backward()
        for name in names:
            gradient = backbone.get_parameter(name).grad
            sums[name] += 0 if gradient is None else gradient.square()
    return sums


def test_the_formulas_in_double_precision() -> None:
    """F = sum of squared gradients, example by example; theta' = theta + sum_j v_j e_{i_j}."""
    backbone, inputs = fresh("bert")
    thetas = {name: parameter.detach().clone() for name, parameter in backbone.double().named_parameters()}
    plain = copy.deepcopy(backbone)
    delta = attach(backbone, FISHMask(density=0.02), head=False)
    backbone.double()
    patches = _patches(delta)
    rows = [{name: value[k : k + 1] for name, value in batch.items()} for batch in _batches() for k in range(4)]
    scores = dict(zip(patches, fisher(list(patches.values()), backbone, rows[:5]), strict=True))
    for name, expected in _fisher_by_hand(list(patches), 5, torch.float64).items():
        torch.testing.assert_close(scores[name].double().view_as(expected), expected, atol=1e-10, rtol=1e-10, msg=name)
    shake(delta)
    for name, patch in patches.items():
        flat = thetas[name].flatten()
        for position, value in zip(patch.index.tolist(), patch.values.detach(), strict=True):
            flat[position] += value
        thetas[name] = flat.view_as(thetas[name])
    with torch.no_grad():
        expected = torch.func.functional_call(plain, thetas, (), inputs).logits
        torch.testing.assert_close(output(backbone, inputs), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("samples", [5, 100])
def test_the_largest_fisher_information(samples: int) -> None:
    backbone, inputs = fresh("bert")
    backbone.train()
    delta = attach(backbone, FISHMask(density=0.01, samples=samples))
    patches = _patches(delta)
    parameters = {key: patch.values for key, patch in patches.items()}
    before = {path: module.training for path, module in backbone.named_modules()}
    Life(delta, 10).begin(_batches())
    expected = _fisher_by_hand(list(patches), samples)
    size = sum(score.numel() for score in expected.values())
    kept = torch.cat([expected[key].flatten()[patch.index.long()] for key, patch in patches.items()])
    budget = round(0.01 * size)
    assert len(kept) == budget == sum(patch.values.numel() for patch in patches.values())
    everything = torch.cat([score.flatten() for score in expected.values()])
    torch.testing.assert_close(kept.sort().values, everything.topk(budget).values.sort().values, rtol=1e-3, atol=1e-7)
    assert all(patches[key].values is parameter and parameter.requires_grad for key, parameter in parameters.items())
    assert {path: module.training for path, module in backbone.named_modules()} == before
    assert not any(patch._forward_hooks for patch in patches.values())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    backbone.eval()
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), output(*fresh("bert"))), "values are 0"


def test_it_trains_what_it_chose_and_is_stored_sparsely(tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, FISHMask(density=0.01), head=False)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.05)  # made before the positions are known
    Life(delta, 10).begin(_batches())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = backbone(**next(_batches())).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert delta.budget().size_bytes == 8 * delta.budget().delta
    save(delta, tmp_path / "saved")
    other, _ = fresh("bert")
    loaded = load(other, tmp_path / "saved")
    assert isinstance(loaded, Delta)
    assert loaded.budget() == delta.budget()
    with torch.no_grad():
        assert torch.equal(output(other, inputs), output(backbone, inputs))


def test_tied_and_repeated_reads_add_up_before_they_are_squared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            self.loss = (self.first(torch.tanh(self.first(x))) - labels).square().sum()
            return self

    torch.manual_seed(0)
    backbone = Twice()
    batch = {"x": torch.randn(2, 4), "labels": torch.randn(2, 4)}
    W = backbone.first.weight.detach().clone().requires_grad_()
    expected = torch.zeros(4, 4)
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        (gradient,) = torch.autograd.grad((torch.tanh(x @ W.T) @ W.T - label).square().sum(), W)
        expected += gradient.square()
    delta = attach(backbone, FISHMask(density=0.25), "first")
    Life(delta, 1).begin([batch])
    (patch,) = _patches(delta).values()
    assert patch.index.tolist() == sorted(expected.flatten().topk(4).indices.tolist())


def test_until_it_is_prepared_it_spreads_evenly() -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, FISHMask(density=0.1), "attention.query")
    for patch in _patches(delta).values():
        index = patch.index
        assert len(index) == max(1, round(0.1 * patch.entries))
        assert len(set((index[1:] - index[:-1]).tolist())) <= 2


def test_a_model_without_a_loss_is_refused() -> None:
    backbone, inputs = fresh("mlp")
    delta = attach(backbone, FISHMask(), "*")
    with pytest.raises(Unsupported, match=r"FISHMask was asked to prepare on Sequential, which returns no `loss`.*Use a model that does"):
        Life(delta, 1).begin([inputs])


def test_a_moved_delta_moves_its_new_positions() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, FISHMask(density=0.02))
    Life(delta, 1).begin(_batches())
    shake(delta)
    backbone.double()
    assert output(backbone, inputs).dtype == torch.float64
    assert {patch.values.dtype for patch in _patches(delta).values()} == {torch.float64}


@pytest.mark.parametrize("fields", [dict(density=0.0), dict(samples=0)])
def test_fields_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=r"FISHMask\((density|samples)=0.*must be greater than 0"):
        FISHMask(**fields)
