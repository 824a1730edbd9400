"""Methods that change or train weights, on a quantised backbone: beside the packed weights they train, into them they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.backbones.quantize import quantize_in_place
from deltatune.errors import Unsupported
from tests.conformance.cells import TRAINING, Cell, shake
from tests.models import output

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SCHEMES = {"int8": "torchao", "nf4": "bitsandbytes"}
BESIDE = {"bitfit", "linear-probe", "norm-tuning", "partial-bitfit", "trainable-tokens"}
"""What they train is never packed."""
INTO = {name for name in TRAINING if type(Cell(name, "bert").recipe).kind in ("weight", "selection")} - BESIDE


def backbone_of(scheme: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    pytest.importorskip(SCHEMES[scheme])
    backbone, inputs = Cell("lora", "bert").fresh()
    assert quantize_in_place(backbone, scheme) > 8
    return backbone, inputs


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", sorted(BESIDE))
def test_what_is_not_packed_trains(method: str, scheme: str) -> None:
    backbone, inputs = backbone_of(scheme)
    with torch.no_grad():
        plain = output(backbone, inputs)
        delta = Cell(method, "bert").attach(backbone)
        assert torch.equal(output(backbone, inputs), plain)
    shake(delta)
    found = output(backbone, inputs)
    assert not torch.equal(found.detach(), plain)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.trained_parameters().values())
    dt.detach(delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", sorted(INTO))
def test_what_is_packed_is_refused_as_such(method: str, scheme: str) -> None:
    backbone, inputs = backbone_of(scheme)
    with torch.no_grad():
        plain = output(backbone, inputs)
    with pytest.raises(Unsupported, match=r"quantised \((Int8Tensor, torch.float32|Tensor, torch.uint8)\)\. Load the backbone"):
        Cell(method, "bert").attach(backbone)
    assert not any("deltatune" in path for path, _ in backbone.named_modules())
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
