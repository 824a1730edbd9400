"""PEFT as the oracle: the same tensors in its model and in ours must give the same outputs and gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import Method
from tests.models import output

Names = Callable[[str], str]
"""Name of a tensor of our delta -> its name in PEFT's model, without ``base_model.model.``."""

Shape = Callable[[str, Tensor], Tensor]
"""Our tensor from PEFT's, or our gradient from PEFT's."""


def same(name: str, tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def compare_with_peft(
    backbone: nn.Module, inputs: dict[str, Tensor], method: Method, where: Any, config: Any, names: Names, shape: Shape = same
) -> Delta:
    """Copy PEFT's random tensors into a delta of ours; outputs and gradients must agree to 1e-5."""
    from peft import get_peft_model

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by names that are going away
        theirs: Any = get_peft_model(copy.deepcopy(backbone), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    theirs.eval()
    delta = attach(backbone, method, where, head=False)
    tensors = dict(theirs.base_model.model.named_parameters())
    pairs = {name: (parameter, tensors[names(name)]) for name, parameter in delta.named_parameters()}
    trained = {id(parameter) for parameter in theirs.parameters() if parameter.requires_grad}
    assert {id(parameter) for _, parameter in pairs.values()} == trained, "both train the same tensors"
    with torch.no_grad():
        for name, (own, other) in pairs.items():
            own.copy_(shape(name, other))
    with torch.no_grad():
        delta.disable()
        plain = output(backbone, inputs)
        delta.enable()
    found, expected = output(backbone, inputs), output(theirs, inputs)
    assert (expected - plain).abs().max() > 1e-2, "the oracle does something"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    for name, (own, other) in pairs.items():
        assert own.grad is not None and other.grad is not None, name
        torch.testing.assert_close(own.grad, shape(name, other.grad), atol=1e-5, rtol=1e-5, msg=name)
    return delta
