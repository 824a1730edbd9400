"""Undo what ``quantize_in_place`` did: plain weights with the values that the quantised ones stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.structure.site import is_packed


def dequantize_in_place(model: nn.Module) -> int:
    """Replace every quantised linear map of ``model`` by a plain one with the same values, W = s Q; returns how many.

    The outputs stay as they were, to rounding; the memory becomes that of the plain model. Detach deltas first: modules
    of bitsandbytes are replaced.
    """
    packed = [(path, module) for path, module in model.named_modules() if _is_packed(module)]
    for path, module in packed:
        weight, source = _plain(module), module
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=source.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = source.bias
        model.set_submodule(path, linear.train(source.training))
    for trace in ("hf_quantizer", "is_quantized"):
        model.__dict__.pop(trace, None)
    return len(packed)


def _is_packed(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and weight is not None and not weight.is_meta and is_packed(weight)


def _plain(module: Any) -> Tensor:
    """The weight (out, in) in the type the module computes in."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes import functional

        made: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        made = weight.data.dequantize()
    return made.to(getattr(module, "compute_dtype", None) or made.dtype).detach().clone(memory_format=torch.contiguous_format)
