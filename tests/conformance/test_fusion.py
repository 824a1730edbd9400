"""AdapterFusion, a composition and so in no cell of the matrix: in each way of running it computes and learns what it does plainly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbones.dequantize import dequantize_in_place
from deltatune.backbones.quantize import quantize_in_place
from deltatune.methods import Adapter
from tests.conformance.cells import fresh, plain, shake
from tests.conformance.test_checkpointing import checkpoint_layers
from tests.conformance.test_quantised import SCHEMES
from tests.models import output

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # of the quantisers
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo hides it itself
]
NAMES = ("a", "b", "c")


def nothing(backbone: nn.Module) -> None:
    """Leave it as it is."""


@dataclass(frozen=True)
class Way:
    """A way of running a backbone.

    Attributes:
        tolerance: how far outputs and gradients may be from the plain run's: norm of the difference by norm.
        before: done to the backbone before anything is attached.
        after: done to it once the fusion acts.
        around: what it runs in.
        plainly: done to the backbone of the plain run in place of ``before``.
    """

    tolerance: float = 1e-5
    before: Callable[[nn.Module], object] = nothing
    after: Callable[[nn.Module], object] = nothing
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    plainly: Callable[[nn.Module], object] = nothing


def rounded(backbone: nn.Module, scheme: str) -> None:
    """Plain weights with the values that the quantised ones stand for."""
    assert quantize_in_place(backbone, scheme) == dequantize_in_place(backbone)


WAYS = {
    "bf16": Way(0.05, before=nn.Module.bfloat16),
    "autocast": Way(0.05, around=partial(torch.autocast, "cpu", torch.bfloat16)),
    "saved-tensor-hooks": Way(after=partial(checkpoint_layers, reentrant=False)),
    "reentrant": Way(after=partial(checkpoint_layers, reentrant=True)),
    "compiled": Way(after=lambda backbone: backbone.compile(fullgraph=True, backend="aot_eager")),
}
WAYS |= {s: Way(before=partial(quantize_in_place, scheme=s), plainly=partial(rounded, scheme=s)) for s in SCHEMES}


def run(model: str, way: Way) -> tuple[Tensor, dict[str, Tensor]]:
    """The output with three fused adapters, and the gradients of the fusion's parameters; no others get any."""
    backbone, inputs = fresh(model)
    way.before(backbone)
    torch.manual_seed(0)
    for k, name in enumerate(NAMES):
        shake(dt.attach(backbone, Adapter(bottleneck_dim=4), name=name, head=False), seed=k)
    composition = dt.compose(backbone, NAMES, "fusion")
    for tensor in composition.mixing.state_dict().values():
        tensor.add_(0.1 * torch.randn(tensor.shape))
    way.after(backbone)
    with way.around():
        found = output(backbone, inputs)
    found.float().square().mean().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert {id(gradient) for gradient in gradients.values()} == {id(p.grad) for p in composition.mixing.parameters()}
    return found.detach().float(), gradients


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_a_fusion_is_the_same_in_each_way_of_running(model: str, way: str) -> None:
    pytest.importorskip(SCHEMES.get(way, "torch"))
    torch.compiler.reset()
    run_in, plainly = WAYS[way], Way(before=WAYS[way].plainly)
    (found, gradients), (expected, exact) = run(model, run_in), run(model, plainly)
    assert apart(expected, plain(model)) > 0.01, "it acts"
    assert apart(found, expected) < run_in.tolerance
    assert gradients.keys() == exact.keys() and all(gradient.abs().max() > 0 for gradient in gradients.values())
    both = [torch.cat([by[name].flatten() for name in exact]) for by in (gradients, exact)]
    assert apart(*both) < run_in.tolerance
