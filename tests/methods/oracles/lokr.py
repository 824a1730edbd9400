"""LoKr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoKrConfig
from torch import Tensor

from deltatune.methods import LoKr, Method
from deltatune.structure.site import Site
from tests.methods.oracles.table import Oracle, Wrong, cases

NAMES = {"C": "lokr_w1", "C_b": "lokr_w1_a", "C_a": "lokr_w1_b", "D": "lokr_w2", "D_b": "lokr_w2_a", "D_a": "lokr_w2_b"}


def config(rank: int, factor: int = -1, factor_both: bool = False, **targets: Any) -> LoKrConfig:
    return LoKrConfig(r=rank, alpha=3.0, decompose_factor=factor, decompose_both=factor_both, **targets)  # type: ignore[arg-type]


def lokr(rank: int, factor: int = -1, factor_both: bool = False) -> LoKr:
    return LoKr(rank=rank, alpha=3.0, factor=factor, factor_both=factor_both)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    assert isinstance(method, LoKr)
    own = {name.removeprefix("kronecker."): tensor for name, tensor in tensors.items()}
    C = own["C"] if "C" in own else own["C_b"] @ own["C_a"]
    D = own["D"] if "D" in own else own["D_b"] @ own["D_a"]
    change = torch.stack([torch.kron(*pair) for pair in zip(C, D, strict=True)]) if C.ndim == 3 else torch.kron(C, D)
    return theta + method.alpha / method.rank * (change.mT if site.transposed else change).reshape(theta.shape)


ORACLE = Oracle(lokr, config, lambda tensor, _: f"{NAMES[tensor.removeprefix('kronecker.')]}.default", formula)
ABSENT = Wrong("PEFT's LoKr does not take it", TypeError)
WRONG = {"conv2d-circular": Wrong("PEFT's change pads with zeros")} | dict.fromkeys(
    ("transposed", "conv3d", "embedding", "attention", "raw-stack", "raw-stack-transposed"), ABSENT
)
LINEARS = ("mlp", "mlp-no-bias", "mlp-sequence", "bert", "llama", "t5")
FLAT = ("conv2d", "conv2d-1x1", "conv2d-strided", "conv2d-dilated", "conv2d-grouped", "conv2d-depthwise")
LINES = ("conv1d", "conv1d-grouped")
WHOLE = Wrong("PEFT multiplies C with the wrong two axes of a whole D: (out_2, in_2, kernel)")
SETTINGS: list[dict[str, Any]] = [dict(rank=1), dict(rank=2), dict(rank=8, factor=4), dict(rank=1, factor_both=True)]
CASES = [
    *cases("lokr", (*LINEARS, *FLAT), SETTINGS),
    *cases("lokr", WRONG, SETTINGS[:3], WRONG),
    *cases("lokr", LINES, [dict(rank=1)]),
    *cases("lokr", LINES, [dict(rank=8)], dict.fromkeys(LINES, WHOLE)),
]
