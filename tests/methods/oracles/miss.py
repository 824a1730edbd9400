"""MiSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import MissConfig
from torch import Tensor

from deltatune.methods import Method, MiSS
from deltatune.structure.site import Site
from tests.methods.oracles.table import Oracle, Wrong, cases


def config(rank: int, mini_rank: int | None = None, **targets: Any) -> MissConfig:
    return MissConfig(r=rank, init_weights="mini" if mini_rank else True, mini_r=mini_rank or 1, **targets)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    """Column j of W changes by row j mod rank of D."""
    assert isinstance(method, MiSS)
    D = tensors["shard.D"]
    matrix = theta.mT if site.transposed else theta
    columns = matrix.shape[-1] if site.parameter else matrix[0].numel()
    change = torch.stack([D[..., j % method.rank, :] for j in range(columns)], -1)
    return theta + (change.mT if site.transposed else change).reshape(theta.shape)


ORACLE = Oracle(lambda rank, mini_rank=None: MiSS(rank, mini_rank=mini_rank), config, lambda tensor, _: "miss_block.default", formula)
WRONG = dict.fromkeys(
    ("transposed", "conv2d", "embedding", "raw-stack", "raw-stack-transposed"), Wrong("PEFT's MiSS does not take it", TypeError)
)
PLACES = ("mlp", "mlp-no-bias", "mlp-sequence", "bert", "llama", "t5")
CASES = [
    *cases("miss", PLACES, [dict(rank=2), dict(rank=5), dict(rank=12)]),
    *cases("miss", ("mlp-sequence", "bert", "llama", "t5"), [dict(rank=4, mini_rank=8)]),
    *cases("miss", WRONG, [dict(rank=3)], WRONG),
]
