"""AdaLoRA, before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig
from torch import Tensor

from deltatune.methods import AdaLoRA, Method
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import LINEARS
from tests.methods.oracles.table import Oracle, OtherTensors, Wrong, cases

NAMES = {"triplets.P": "lora_B.default", "triplets.Lambda": "lora_E.default", "triplets.Q": "lora_A.default"}


def config(rank: int, alpha: float = 3.0, **targets: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=alpha, tinit=1, tfinal=1, total_step=9, **targets)


def names(tensor: str, site: Site) -> str:
    return NAMES[tensor]


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    assert isinstance(method, AdaLoRA)
    P, Lambda, Q = (tensors[name] for name in NAMES)
    change = method.alpha / method.initial_rank * P @ Lambda.diag_embed() @ Q
    return theta + (change.mT if site.transposed else change).reshape(theta.shape)


def adalora(rank: int, alpha: float = 3.0) -> AdaLoRA:
    return AdaLoRA(rank=rank, initial_rank=rank, alpha=alpha)


GROUPED = Wrong("PEFT's change has the shape of a convolution without groups", OtherTensors)
ALONE = "PEFT takes linears and Conv2d alone"
REFUSED = dict.fromkeys(["conv1d", "attention"], Wrong(ALONE, ValueError)) | dict.fromkeys(
    ["raw-kernel", "raw-stack", "raw-stack-transposed"], Wrong(ALONE, TypeError)
)
WRONG = {**REFUSED, "conv2d-grouped": GROUPED, "conv2d-depthwise": GROUPED}
SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=6, alpha=12.0)]
ORACLE = Oracle(adalora, config, names, formula)
CASES = cases("adalora", [*(host.name for host in LINEARS), "conv2d", "conv2d-1x1", "conv2d-strided", "conv2d-dilated"], SETTINGS)
CASES += cases("adalora", list(WRONG), SETTINGS[:1], WRONG)
