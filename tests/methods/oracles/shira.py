"""SHiRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import ShiraConfig
from torch import Tensor

from deltatune.methods import Method, SHiRA
from deltatune.structure.site import Site
from tests.methods.oracles.table import Oracle, Wrong, cases


def config(rank: int, seed: int = 0, **targets: Any) -> ShiraConfig:
    return ShiraConfig(r=rank, random_seed=seed, **targets)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    """S by its places, drawn as PEFT draws them, one matrix after the other."""
    assert isinstance(method, SHiRA)
    stored = theta if theta.ndim == 3 and site.parameter else theta[None]
    matrices = (stored.mT if site.transposed else stored).flatten(2)
    generator = torch.Generator().manual_seed(method.seed)
    parts = tensors["values"].view(len(matrices), -1)
    changed = []
    for W, values in zip(matrices, parts, strict=True):
        places = torch.randperm(W.numel(), generator=generator)[: method.rank * sum(W.shape)].sort().values
        S = torch.zeros(W.numel()).index_put((places,), values)
        changed.append(W + S.view(W.shape))
    found = torch.stack(changed)
    return (found.mT if site.transposed else found).reshape(theta.shape)


ORACLE = Oracle(SHiRA, config, lambda tensor, _: "shira_weight.default", formula)
WRONG = dict.fromkeys(
    ("transposed", "conv2d", "embedding", "raw-stack", "raw-stack-transposed"), Wrong("PEFT's SHiRA does not take it", TypeError)
)
PLACES = ("mlp", "mlp-no-bias", "mlp-sequence", "bert", "llama", "t5")
CASES = [
    *cases("shira", PLACES, [dict(rank=2), dict(rank=3, seed=7), dict(rank=1, seed=1)]),
    *cases("shira", WRONG, [dict(rank=1)], WRONG),
]
