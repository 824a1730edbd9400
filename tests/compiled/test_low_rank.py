"""The compiled loops of training give what torch's own operations give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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
