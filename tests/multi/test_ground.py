"""What tenants train lies side by side: stacked without a copy, and nobody has what was another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune.methods import IA3, Adapter, LoRA
from deltatune.multi.ground import Ground
from deltatune.multi.operators.even import Even
from deltatune.multi.own import Own
from deltatune.multi.picks import Picks
from tests.multi.alone import alone, far, job, result, still, together

CPU = torch.device("cpu")


class Tent:
    """A settler with two matrices."""

    def __init__(self, ground: Ground, seed: int) -> None:
        self.ground = ground
        values = torch.randn(14, generator=torch.Generator().manual_seed(seed))
        self.a, self.b = (torch.nn.Parameter(part) for part in (torch.empty(2, 3), torch.empty(4, 2)))
        ground.enter(self, values, torch.zeros(14))
        self.before = values

    def settle(self, row: int) -> None:
        values, gradients = self.ground.values[row], self.ground.gradients[row]
        for parameter, part in ((self.a, slice(0, 6)), (self.b, slice(6, 14))):
            parameter.data, parameter.grad = values[part].view(parameter.shape), gradients[part].view(parameter.shape)

    @property
    def is_whole(self) -> bool:
        return torch.equal(torch.cat([self.a.detach().flatten(), self.b.detach().flatten()]), self.before)


def tents(count: int) -> tuple[Ground, list[Tent]]:
    ground = Ground(14, torch.empty(0))
    return ground, [Tent(ground, seed) for seed in range(count)]


def test_rows_are_taken_without_gaps() -> None:
    ground, own = tents(5)
    assert all(tent.is_whole for tent in own) and len(ground.values) == 8
    left = own.pop(1)
    ground.leave(left)
    assert all(tent.is_whole for tent in own)
    assert ground.settlers == [own[0], own[3], own[1], own[2]]
    ground.leave(own.pop(2))
    assert ground.settlers == [own[0], own[2], own[1]] and all(tent.is_whole for tent in own)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 2), (3, 1), (2,)], ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0), (2.0, 0.5, 3.0, 1.0)], ids=str)
def test_what_lies_side_by_side_is_stacked(chosen: tuple[int, ...], scales: tuple[float, ...]) -> None:
    ground, own = tents(4)
    parts, numbers = [own[k].b.T for k in chosen], [scales[k] for k in chosen]
    stacked = ground.stacked(parts, numbers)
    assert stacked is not None
    expected = torch.stack([part.detach() * number for part, number in zip(parts, numbers, strict=True)])
    torch.testing.assert_close(stacked(), expected)
    (weights := torch.randn_like(expected)).mul(stacked()).sum().backward()
    for tent in own:
        assert tent.a.grad is not None and not tent.a.grad.any()
    for k, weight in zip(chosen, weights, strict=True):
        torch.testing.assert_close(own[k].b.grad, scales[k] * weight.T)
    for k in {*range(4)} - {*chosen}:
        assert own[k].b.grad is not None and not own[k].b.grad.any()


def test_what_lies_elsewhere_is_not() -> None:
    ground, own = tents(2)
    _, others = tents(1)
    ones = [1.0, 1.0]
    assert ground.stacked([own[0].a, others[0].a], ones) is None
    assert ground.stacked([own[0].b, own[1].a], ones) is None
    assert ground.stacked([own[0].b[:2], own[1].b[1:3]], ones) is None
    assert ground.stacked([own[0].a.detach(), own[1].a.detach()], ones) is None
    assert ground.stacked([own[0].a[:1].expand(3, 3), own[1].a[:1].expand(3, 3)], ones) is None


@pytest.mark.parametrize("scales", [(1.5, 1.5), (2.0, 0.5)], ids=str)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_the_operation_is_its_formula(scales: tuple[float, ...], order: tuple[int, ...]) -> None:
    """y + s (x A^T) B^T with a row of two tokens each, beside the same by autograd."""
    ground, own = tents(2)
    draw = torch.Generator().manual_seed(9)
    y, x, weights = (torch.randn(4, 2, width, generator=draw, requires_grad=True) for width in (4, 3, 4))
    A = ground.stacked([own[k].a.T for k in order], [1.0, 1.0])
    B = ground.stacked([own[k].b.T for k in order], [scales[k] for k in order])
    assert A is not None and B is not None

    def formula(row: Tensor, k: int) -> Tensor:
        return scales[k] * row @ copies[k][0].T @ copies[k][1].T

    copies = [[parameter.detach().clone().requires_grad_() for parameter in (tent.a, tent.b)] for tent in own]
    plain = y + torch.stack([formula(x[row], order[row // 2]) for row in range(4)])
    expected = torch.autograd.grad((plain * weights).sum(), [y, x, *copies[0], *copies[1]])
    found = Even.beside(y, x, A, B)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), [y, x]), expected[:2])
    for tent, gradients in zip(own, (expected[2:4], expected[4:]), strict=True):
        torch.testing.assert_close((tent.a.grad, tent.b.grad), gradients)


def test_even_rows_are_seen() -> None:
    assert Picks((1, 1, 2, 2), CPU, first=1).is_even and Picks((1, 2, 3), CPU, first=1).is_even
    assert not Picks((1, 1, 2), CPU, first=1).is_even
    assert not Picks((1, 2, 1, 2), CPU, first=1).is_even
    assert not Picks((0, 1, 2), CPU).is_even


@pytest.mark.parametrize("tokens", [100_000, 60])
def test_jobs_of_one_shape_are_looked_at_together(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only some of them share a forward, have batches of other sizes, join late, or leave."""
    looked: list[int] = []
    whole = Own.__call__
    once = Even.beside
    monkeypatch.setattr(Own, "__call__", lambda self: looked.append(-1 if self.beside is None else len(self.sources)) or whole(self))
    monkeypatch.setattr(Even, "beside", staticmethod(lambda y, x, A, B: looked.append(A.count) or once(y, x, A, B)))
    model = still("bert")
    kinds: list[Any] = [LoRA(rank=2), LoRA(rank=2, alpha=2.0), LoRA(rank=2), Adapter(bottleneck_dim=2), Adapter(bottleneck_dim=2), IA3()]
    jobs = [
        job(kind, seed=seed, max_steps=8 + 3 * (seed % 3), batch_size=3 + seed % 2, lr=1e-3 * (1 + seed)) for seed, kind in enumerate(kinds)
    ]
    for outcome, one in zip(together(model, jobs, at_once=5, tokens=tokens), jobs, strict=True):
        assert far(result(outcome), alone(model, one)) < 1e-5
    assert max(looked) >= 2
