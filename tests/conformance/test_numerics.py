"""Types: a delta follows ``to``, and merging into half precision rounds once; ``rules.precision`` has autocast and bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.injection.attach import detach
from deltatune.injection.merge import merge, unmerge
from tests.conformance.cells import TAKEN, Cell, moved, shake
from tests.conformance.rules.precision import cast
from tests.conformance.sample import pairwise
from tests.models import SORTS, output

DOUBLE = [cell for cell in TAKEN if cell.model not in {build.__name__ for build in SORTS["mixture"]}]
"""The experts of transformers' mixtures have no kernel in double precision."""


@pytest.mark.parametrize("cell", pairwise(DOUBLE, ("method",), ("act", "sort"), ("model",)), ids=str)
@torch.no_grad()
def test_a_delta_follows_to(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    plain = output(backbone.double(), cast(inputs, torch.float64))
    backbone.float()
    delta = cell.attach(backbone)
    shake(delta)
    single = output(backbone, inputs)
    backbone.double()
    assert {tensor.dtype for tensor in delta.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    double = output(backbone, cast(inputs, torch.float64))
    assert double.dtype == torch.float64
    assert moved(single.double(), double) < 1e-4
    delta.disable()
    assert moved(output(backbone, cast(inputs, torch.float64)), plain) < 1e-12
    detach(delta)
    assert torch.equal(output(backbone, cast(inputs, torch.float64)), plain)


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
    exact = weight.double() + delta.method.scale(2) * entry.patch.lora_B.double() @ entry.patch.lora_A.double()  # type: ignore[attr-defined]
    merge(delta)
    assert torch.equal(entry.site.weight, exact.to(dtype))
    unmerge(delta)
    assert torch.equal(entry.site.weight, weight)


class _Single(TorchDispatchMode):
    """Counts the operations that give fp32 tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += isinstance(found, torch.Tensor) and found.dtype == torch.float32
        return found


@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "diff-pruning", "bitfit", "prompt-tuning", "prefix-tuning"])
@torch.no_grad()
def test_where_all_is_half_precision_nothing_is_upcast(method: str) -> None:
    cell = Cell(method, "llama")
    backbone, inputs = cell.fresh()
    backbone.bfloat16()
    counts = []
    for attached in (False, True):
        if attached:
            shake(cell.attach(backbone))
            backbone.bfloat16()
            output(backbone, inputs)  # what is kept from forward to forward is made
        with _Single() as single:
            output(backbone, inputs)
        counts.append(single.count)
    assert counts[0] > 0, "norms and softmax of the backbone's own"
    assert counts[1] == counts[0]
