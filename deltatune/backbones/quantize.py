"""Quantise a loaded backbone in place: int8 by torchao, nf4 by bitsandbytes; both run on CPU and GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from deltatune.errors import missing_extra
from deltatune.structure.index import index


def quantize_in_place(model: nn.Module, scheme: str, skip: Collection[str] = ()) -> int:
    """Quantise every ``nn.Linear`` of ``model``; returns how many.

    ``int8`` keeps the modules and packs their weights (W = s * Q, one scale s per output row, activations stay as they
    are); ``nf4`` replaces the modules by bitsandbytes' ``Linear4bit`` (blocks of 64 weights share one scale). Left as
    they are: task heads, which have to train, layers whose parameters are named in ``skip``, layers whose weight is tied
    to an embedding, and those that transformers says stay in full precision, as T5's ``wo``, to whose type T5 casts.

    Raises:
        MissingExtra: the quantiser is not installed.
    """
    linears = dict(_linears(model, frozenset(skip)))
    if scheme == "int8":
        _int8(model, linears)
    else:
        _nf4(model, linears)
    return len(linears)


def _precise(model: nn.Module) -> set[str]:
    """Names of modules that transformers keeps in full precision in this model, or in a part of it."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {name for module in model.modules() for one in lists for name in getattr(module, one, None) or ()}


def _linears(model: nn.Module, skip: frozenset[str]) -> Iterator[tuple[str, nn.Linear]]:
    precise = _precise(model)
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = {id(module) for site in index(model) if site.leaf == "readout" for module in site.module.modules()}
    for path, module in model.named_modules():
        if id(module) in heads or not precise.isdisjoint(path.split(".")):
            continue
        if type(module) is nn.Linear and f"{path}.weight" not in skip and id(module.weight) not in embedded:
            yield path, module


def _int8(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as cause:
        raise missing_extra("torchao", "quantize") from cause
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, path: path in linears)
    for linear in linears.values():
        linear.weight.requires_grad_(False)


def _nf4(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError as cause:
        raise missing_extra("bitsandbytes", "quantize") from cause
    empty: Any = Linear4bit  # bitsandbytes has no types
    for path, linear in linears.items():
        weight = linear.weight
        sizes: tuple[Any, Any] = (linear.in_features, linear.out_features)
        packed = empty(*sizes, bias=linear.bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        packed.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=packed)
        packed.bias = linear.bias
        model.set_submodule(path, packed.to(weight.device))
