"""A quantised backbone on the CPU: deltas beside the packed weights train, kinds that need the weights refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.backbones.quantize import quantize_in_place
from deltatune.errors import DeltaError, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.merge import merge
from deltatune.methods import BitFit, DiffPruning, FullFineTuning, LoRA
from tests.conformance.cells import TAKEN, Cell, fresh, shake
from tests.conformance.sample import pairwise
from tests.models import output

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SCHEMES = {"int8": "torchao", "nf4": "bitsandbytes"}
BESIDE = pairwise(
    (cell for cell in TAKEN if cell.model in ("bert", "llama", "t5", "bart") and type(cell.recipe).kind in ("output", "context")),
    ("method",),
    ("act", "model"),
)


def quantised(model: str, scheme: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    pytest.importorskip(SCHEMES[scheme])
    backbone, inputs = fresh(model)
    assert quantize_in_place(backbone, scheme) > 8
    return backbone, inputs


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cell", BESIDE, ids=str)
def test_deltas_beside_packed_weights(cell: Cell, scheme: str) -> None:
    backbone, inputs = quantised(cell.model, scheme)
    with torch.no_grad():
        plain = output(backbone, inputs)
    if type(cell.recipe).reads_weights:
        with pytest.raises(DeltaError, match=r"unquantised|quantised|int8|uint8"):
            cell.attach(backbone)
        return
    with torch.no_grad():
        delta = cell.attach(backbone)
        if type(delta.method).identity:
            assert torch.equal(output(backbone, inputs), plain)
    shake(delta)
    found = output(backbone, inputs)
    assert not torch.equal(found.detach(), plain)
    found.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.trained_parameters().values())
    detach(delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", [FullFineTuning(), DiffPruning()], ids=["full", "diff-pruning"])
def test_weights_that_are_packed_do_not_train(method: FullFineTuning | DiffPruning, scheme: str) -> None:
    backbone, inputs = quantised("llama", scheme)
    with torch.no_grad():
        plain = output(backbone, inputs)
    with pytest.raises(DeltaError, match=r"unquantised|quantised|int8|uint8"):
        attach(backbone, method, "attention.query")
        output(backbone, inputs)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_weight_takes_no_merge(scheme: str) -> None:
    backbone, inputs = quantised("llama", scheme)
    delta = attach(backbone, LoRA(rank=2))
    shake(delta)
    with torch.no_grad():
        expected = output(backbone, inputs)
    with pytest.raises(Unsupported, match=r"quantised, sharded or offloaded\. Load the backbone in full precision"):
        merge(delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_beside_packed_weights_train(scheme: str) -> None:
    backbone, inputs = quantised("bert", scheme)
    delta = attach(backbone, BitFit())
    output(backbone, inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.trained_parameters().values())


@torch.no_grad()
def test_quantising_behind_attaching_leaves_the_delta_alone() -> None:
    for method in ("lora", "adapter", "prefix-tuning"):
        backbone, _ = quantised("llama", "int8")
        first = Cell(method, "llama").attach(backbone)
        shake(first)
        late, inputs = fresh("llama")
        count = quantize_in_place(fresh("llama")[0], "int8")
        second = Cell(method, "llama").attach(late)
        shake(second)
        assert quantize_in_place(late, "int8") == count, "patches are no layers of the backbone"
        assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
        assert torch.equal(output(late, inputs), output(backbone, inputs))
