"""The compiled loops of training give what torch's own operations give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deltatune as dt
from deltatune.injection import fused
from deltatune.injection.fused import Operands, has_loops, outputs_of
from deltatune.methods import LoRA

pytestmark = pytest.mark.usefixtures("compiled")


def maps(width: int, rank: int, outs: Sequence[int], bias: bool) -> list[Operands]:
    return [
        Operands(
            torch.randn(out, width) / width**0.5,
            torch.randn(out) if bias else None,
            (torch.randn(rank, width) / width**0.5).requires_grad_(),
            torch.randn(out, rank).requires_grad_(),
            0.5 + place,
        )
        for place, out in enumerate(outs)
    ]


def gradients(x: Tensor, folded: bool, operands: list[Operands], used: slice) -> list[Tensor]:
    outputs = outputs_of(x, operands, folded)
    wanted = [x, *(tensor for one in operands[used] for tensor in (one.A, one.B))]
    loss = sum((y.sin() * torch.arange(y.numel()).view(y.shape)).mean() for y in outputs[used])
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("folded", [False, True], ids=["beside", "folded"])
@pytest.mark.parametrize(("width", "rank", "outs", "tokens"), [(48, 8, (33, 16), 21), (17, 4, (64,), 8), (130, 16, (5, 70, 70), 3)])
@pytest.mark.parametrize("used", [slice(None), slice(0, 1)], ids=["all", "one"])
def test_it_equals_the_operations(
    folded: bool, width: int, rank: int, outs: tuple[int, ...], tokens: int, used: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, operands = torch.randn(2, tokens, width).requires_grad_(), maps(width, rank, outs, bias=width % 2 == 0)
    assert has_loops(x, operands)
    found = gradients(x, folded, operands, used)
    monkeypatch.setattr(fused, "is_compiled", lambda: False)
    wanted = gradients(x, folded, operands, used)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_any_order_of_memory_and_gradients_in_the_same() -> None:
    """Of a parameter that is seen turned, such as LoRA's, nothing has to be copied; views with gaps are read as well."""
    torch.manual_seed(0)
    x, plain = torch.randn(2, 9, 40), maps(40, 8, (24, 33), bias=True)
    turned = [replace(one, A=one.A.detach().T.contiguous().T, B=one.B.detach().T.contiguous().T) for one in plain]
    spread = [replace(one, A=torch.stack([one.A.detach()] * 2, -1)[..., 0], B=one.B.detach().repeat(2, 1)[: len(one.B)]) for one in plain]
    found = gradients(x.requires_grad_(), False, plain, slice(None))
    for others in (turned, spread):
        for one in others:
            one.A.requires_grad_(), one.B.requires_grad_()
        for mine, other in zip(gradients(x, False, others, slice(None)), found, strict=True):
            torch.testing.assert_close(mine, other)
    raw = torch.ops.deltatune.low_rank_backward(x, [turned[0].W], [turned[0].A], [turned[0].B], [2.0], [torch.randn(2, 9, 24)], False, True)
    assert raw[1][0].stride() == turned[0].A.stride() and raw[2][0].stride() == turned[0].B.stride()


def test_threads_add_up() -> None:
    """Each thread sums a part of the tokens."""
    torch.manual_seed(0)
    x, operands = torch.randn(3, 41, 40).requires_grad_(), maps(40, 8, (24,), bias=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(x, False, operands, slice(None)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())


def test_what_has_no_loops() -> None:
    x, operands = torch.randn(2, 5, 6), maps(6, 8, (7,), bias=False)
    assert not has_loops(x, maps(6, 3, (7,), bias=False)) and not has_loops(x.double(), operands)


def test_a_single_map_runs_in_them_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8))
    delta = dt.attach(model, LoRA(rank=8), ["0", "2"])
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(4, 32)
    calls: list[bool] = []
    own = fused.has_loops
    monkeypatch.setattr(fused, "has_loops", lambda *given: calls.append(own(*given)) or calls[-1])
    found = [*torch.autograd.grad(model(x).square().sum(), list(delta.parameters()))]
    assert calls and all(calls)
    monkeypatch.setattr(fused, "has_loops", lambda *given: False)
    for one, other in zip(found, torch.autograd.grad(model(x).square().sum(), list(delta.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("folded", [False, True], ids=["beside", "folded"])
def test_a_gradient_of_the_gradient(folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, operands = torch.randn(2, 5, 12).requires_grad_(), maps(12, 4, (9, 7), bias=True)

    def twice() -> list[Tensor]:
        y, _ = outputs_of(x, operands, folded)
        (slope,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [x, operands[0].A, operands[0].B]))

    found = twice()
    monkeypatch.setattr(fused, "is_compiled", lambda: False)
    for one, other in zip(found, twice(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_biases_learn_as_well() -> None:
    """Where some maps have one, and some of those learn."""
    torch.manual_seed(0)
    x, (one, two, three) = torch.randn(3, 12), maps(12, 4, (9, 7, 8), bias=True)
    assert two.b is not None and three.b is not None
    operands = [replace(one, b=None), replace(two, b=two.b.requires_grad_()), three]
    y = outputs_of(x, operands, False)
    sum(part.square().sum() for part in y).backward()
    torch.testing.assert_close(two.b.grad, 2 * y[1].detach().sum(0))
    assert three.b.grad is None and one.W.grad is None and x.grad is None
    assert all(entry.A.grad is not None and entry.B.grad is not None for entry in operands)


def test_tensors_without_numbers_find_their_way() -> None:
    with FakeTensorMode():
        x, operands = torch.randn(2, 5, 12).requires_grad_(), maps(12, 4, (9, 7), bias=True)
        y = outputs_of(x, operands, False)
        sum(part.sum() for part in y).backward()
    assert [part.shape for part in y] == [(2, 5, 9), (2, 5, 7)]
    assert x.grad is not None and x.grad.shape == x.shape and operands[1].B.grad is not None


def test_what_is_kept_passes_the_hooks_of_whoever_keeps_it() -> None:
    """Recomputing and checkpointing replace saved tensors; x changed behind the forward is noticed."""
    x, operands = torch.randn(4, 12).requires_grad_(), maps(12, 4, (9,), bias=False)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        outputs_of(x, operands, False)
    assert {tensor.data_ptr() for tensor in seen} == {one.data_ptr() for one in (x, operands[0].W, operands[0].A, operands[0].B)}
    inner = x * 1
    (y,) = outputs_of(inner, operands, False)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
