"""LoHa."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoHaConfig
from torch import Tensor

from deltatune.methods import LoHa, Method
from deltatune.structure.site import Site
from tests.methods.oracles.table import Oracle, Wrong, cases

NAMES = {"A_1": "hada_w1_b", "B_1": "hada_w1_a", "A_2": "hada_w2_b", "B_2": "hada_w2_a"}


def config(rank: int, alpha: float = 3.0, **targets: Any) -> LoHaConfig:
    return LoHaConfig(r=rank, alpha=alpha, **targets)  # type: ignore[arg-type]


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    assert isinstance(method, LoHa)
    change = method.alpha / method.rank * (tensors["B_1"] @ tensors["A_1"]) * (tensors["B_2"] @ tensors["A_2"])
    return theta + (change.mT if site.transposed else change).reshape(theta.shape)


ORACLE = Oracle(lambda rank, alpha=3.0: LoHa(rank, alpha), config, lambda tensor, _: f"{NAMES[tensor]}.default", formula)
ABSENT = Wrong("PEFT's LoHa does not take it", TypeError)
WRONG = {"conv2d-circular": Wrong("PEFT's change pads with zeros")} | dict.fromkeys(
    ("transposed", "conv3d", "embedding", "attention", "raw-stack", "raw-stack-transposed"), ABSENT
)
LINEARS = ("mlp", "mlp-no-bias", "mlp-sequence", "bert", "llama", "t5")
CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv2d-1x1",
    "conv2d-strided",
    "conv2d-dilated",
    "conv1d-grouped",
    "conv2d-grouped",
    "conv2d-depthwise",
)
CASES = cases("loha", (*LINEARS, *CONVOLUTIONS, *WRONG), [dict(rank=4), dict(rank=3, alpha=6.0)], WRONG)
