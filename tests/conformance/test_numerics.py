"""Types: a patch is fp32 by default, follows ``to``, and neither changes the type of a backbone's outputs nor breaks autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltatune.injection.attach import detach
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import CHILD
from tests.conformance.cells import TAKEN, Cell, moved, over, shake
from tests.conformance.trace import trace
from tests.models import output


@pytest.fixture(autouse=True)
def the_same_kernels() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` has a fused path with other rounding, which it leaves where a module has hooks."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def _cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@over(TAKEN)
def test_a_half_precision_backbone(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    backbone, inputs = backbone.to(torch.bfloat16), _cast(inputs, torch.bfloat16)
    before = trace(backbone)
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = cell.attach(backbone)
    added = [p for name, p in backbone.named_parameters() if CHILD in name.split(".")]
    assert all(parameter.dtype == torch.float32 for parameter in added)
    with torch.no_grad():
        fresh = output(backbone, inputs)
    assert fresh.dtype == plain.dtype == torch.bfloat16
    if type(delta.method).identity:
        assert torch.equal(fresh, plain)
    shake(delta)
    output(backbone, inputs).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in delta.trained_parameters().values())
    detach(delta)
    assert trace(backbone).differences(before) == []


@over(TAKEN)
def test_autocast_runs_as_the_plain_backbone_does(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = output(backbone, inputs)
    delta = cell.attach(backbone)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            fresh = output(backbone, inputs)
        assert fresh.dtype == plain.dtype
        if type(delta.method).identity:
            assert torch.equal(fresh, plain)
        shake(delta)
        exact = output(backbone, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(backbone, inputs)
    assert float((found.detach() - exact).norm() / exact.norm()) < 0.2
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.trained_parameters().values())


@over([cell for cell in TAKEN if cell.model in ("bert", "t5", "phi3", "torch_encoder", "conv_net", "tied_mlp")])
@torch.no_grad()
def test_a_delta_follows_to(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    plain = output(backbone.double(), _cast(inputs, torch.float64))
    backbone.float()
    delta = cell.attach(backbone)
    shake(delta)
    single = output(backbone, inputs)
    backbone.double()
    assert {tensor.dtype for tensor in delta.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    double = output(backbone, _cast(inputs, torch.float64))
    assert double.dtype == torch.float64
    assert moved(single.double(), double) < 1e-4
    delta.disable()
    assert moved(output(backbone, _cast(inputs, torch.float64)), plain) < 1e-12
    detach(delta)
    assert torch.equal(output(backbone, _cast(inputs, torch.float64)), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_merging_into_half_precision_rounds_once(dtype: torch.dtype) -> None:
    cell = next(cell for cell in TAKEN if str(cell) == "lora-llama")
    backbone, _ = cell.fresh()
    backbone.to(dtype)
    delta = cell.attach(backbone)
    shake(delta)
    entry = delta.entries[0]
    weight = entry.site.weight.clone()
    exact = weight.double() + delta.method.scale * entry.patch.lora_B.double() @ entry.patch.lora_A.double()  # type: ignore[attr-defined]
    merge(delta)
    assert torch.equal(entry.site.weight, exact.to(dtype))
    unmerge(delta)
    assert torch.equal(entry.site.weight, weight)
