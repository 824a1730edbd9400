"""Deltas that look trained, on tiny backbones whose task heads differ from instance to instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint.record import RECORD, TENSORS
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import Method
from deltatune.structure.index import index
from tests.conformance.cells import small as small
from tests.models import MODELS


def backbone(name: str, head: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny backbone with its own random task head, and inputs for it."""
    model, inputs = MODELS[name]()
    generator = torch.Generator().manual_seed(head)
    with torch.no_grad():
        for site in index(model):
            if site.leaf == "readout":
                for parameter in site.module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype), inputs


def train(delta: Delta, seed: int = 0) -> Delta:
    """Move every trained parameter, as some steps of training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.trained_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return delta


def trained(model: nn.Module, method: Method | str = "lora", **options: Any) -> Delta:
    """A delta that looks trained."""
    recipe = small(method) if isinstance(method, str) else method
    return train(dt.attach(model, recipe, **{"name": "d", **options}))


def files(folder: Path) -> tuple[bytes, bytes]:
    """The bytes of a saved delta."""
    return (folder / RECORD).read_bytes(), (folder / TENSORS).read_bytes()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a backbone holds, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names and bits, in the same order."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
