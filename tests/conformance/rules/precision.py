"""Types: a patch is fp32 by default, and neither changes the type of a backbone's outputs nor breaks autocast."""

from __future__ import annotations

import torch
from torch import Tensor

import deltatune as dt
from deltatune.injection.slot import CHILD
from tests.conformance.cells import one_kernel, plain, shake
from tests.conformance.sitting import Sitting
from tests.conformance.trace import trace
from tests.models import output


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs whose floating-point tensors are of one type."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def autocast_leaves_a_fresh_delta_the_identity(sitting: Sitting) -> None:
    """Type and bits are those of the plain backbone under autocast."""
    delta = sitting.fresh()
    expected = plain(sitting.cell.model, torch.bfloat16)
    with one_kernel(), torch.autocast("cpu", torch.bfloat16):
        found = sitting.output()
    assert found.dtype == expected.dtype
    if type(delta.method).identity:
        assert torch.equal(found, expected)


def autocast_trains(sitting: Sitting) -> None:
    """The output is near the exact one, and every trained parameter gets a finite gradient."""
    delta = sitting.trained()
    with one_kernel(), torch.autocast("cpu", torch.bfloat16):
        found = output(sitting.backbone, sitting.inputs)
    exact = sitting.acting
    assert float((found.detach() - exact).norm() / exact.norm()) < 0.2
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.trained_parameters().values())
    sitting.backbone.zero_grad()


def a_half_precision_backbone(sitting: Sitting) -> None:
    """bf16 in, bf16 out, fp32 patches, the identity where promised, gradients, and no trace."""
    backbone, inputs = sitting.cell.fresh()
    backbone, inputs = backbone.to(torch.bfloat16), cast(inputs, torch.bfloat16)
    before = trace(backbone)
    with one_kernel():
        with torch.no_grad():
            expected = output(backbone, inputs)
        delta = sitting.cell.attach(backbone)
        assert {p.dtype for name, p in backbone.named_parameters() if CHILD in name.split(".")} <= {torch.float32}
        with torch.no_grad():
            found = output(backbone, inputs)
        assert found.dtype == expected.dtype == torch.bfloat16
        if type(delta.method).identity:
            assert torch.equal(found, expected)
        shake(delta)
        output(backbone, inputs).float().square().mean().backward()
    gradients = [(p.grad, p.dtype) for p in delta.trained_parameters().values()]
    assert all(g is not None and g.dtype == dtype and g.isfinite().all() for g, dtype in gradients)
    dt.detach(delta)
    assert trace(backbone).differences(before) == []
