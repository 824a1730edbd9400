"""What a review of the kernel broke: calls in odd orders, broken-off forwards, ties, names, and several deltas in one place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deltatune.injection.attach import attach, detach
from deltatune.injection.state import backbone_state
from deltatune.methods import DiffPruning, LoRA
from tests.conformance.cells import shake
from tests.conformance.trace import trace
from tests.models import TiedMLP, output, tied_mlp


def _broken_off(backbone: nn.Module, at: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run a forward that Ctrl-C ends right behind ``at``; PyTorch runs no always_call hooks then."""

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    handle = at.register_forward_hook(press, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        output(backbone, inputs)
    handle.remove()


def test_a_forward_broken_off_loses_no_weight() -> None:
    backbone, inputs = tied_mlp()
    assert isinstance(backbone, TiedMLP)
    before, plain = trace(backbone), output(backbone, inputs)
    delta = attach(backbone, DiffPruning(), "*")
    shake(delta)
    expected = output(backbone, inputs)
    _broken_off(backbone, backbone.second, inputs)
    assert not isinstance(backbone.second._parameters["weight"], nn.Parameter)
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in backbone_state(backbone).items())
    assert torch.equal(output(backbone, inputs), expected)
    assert isinstance(backbone.second.weight, nn.Parameter)
    _broken_off(backbone, backbone.second, inputs)
    detach(delta)
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), plain)


class Recursive(nn.Module):
    """h <- tanh(h W), as often as told, by calling itself."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        x = x if depth == 1 else self(x, depth - 1)
        return torch.tanh(x @ self.W)


def test_a_module_that_calls_itself_is_swapped_once() -> None:
    backbone = nn.Sequential(Recursive()).eval()
    x = torch.randn(2, 4)
    delta = attach(backbone, DiffPruning(), "0.W")
    shake(delta)
    theta = delta.patches[0](delta.entries[0].parameter)
    expected = torch.tanh(torch.tanh(torch.tanh(x @ theta) @ theta) @ theta)
    assert torch.allclose(backbone(x), expected)
    detach(delta)


@torch.no_grad()
def test_effective_weights_do_not_depend_on_who_asked_first() -> None:
    backbone, inputs = tied_mlp()
    delta = attach(backbone, LoRA(rank=2), "first")
    shake(delta, spread=1.0)
    expected = output(copy.deepcopy(backbone), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output(backbone, inputs)
    assert torch.equal(output(backbone, inputs), expected)
