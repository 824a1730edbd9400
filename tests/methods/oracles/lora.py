"""LoRA and rsLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from deltatune.methods import LoRA, Method
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import CONVOLUTIONS, LINEARS
from tests.methods.oracles.table import Oracle, OtherTensors, Wrong, cases


def config(rank: int, alpha: float = 3.0, rank_stabilized: bool = False, **targets: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rank_stabilized, init_lora_weights=False, **targets)


def names(tensor: str, site: Site) -> str:
    if isinstance(site.module, nn.Embedding):
        return f"lora_embedding_{tensor[-1]}.default"
    return f"{tensor}.default.weight"


def shaped(name: str, own: Tensor, theirs: Tensor) -> Tensor:
    """PEFT lays the experts' B out as (out, rank, experts)."""
    if own.ndim == 3 and name == "lora_B":
        return theirs.reshape(own.shape[1], own.shape[2], own.shape[0]).permute(2, 0, 1)
    return theirs.reshape(own.shape)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    assert isinstance(method, LoRA)
    return theta + method.scale(method.rank) * (tensors["lora_B"] @ tensors["lora_A"]).reshape(theta.shape)


def lora(rank: int, alpha: float = 3.0, rank_stabilized: bool = False) -> LoRA:
    return LoRA(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)


ORACLE = Oracle(lora, config, names, formula, shaped)
GROUPED = Wrong("PEFT lets each group read every channel, which is no change of the weight and cannot be merged", OtherTensors)
WRONG = {
    "conv2d-dilated": Wrong("PEFT's A forgets the dilation", RuntimeError),
    "conv2d-circular": Wrong("PEFT's A pads with zeros"),
    "attention": Wrong("PEFT adds the change of `out_proj` twice: its merge for the forward merges the inner layer once more"),
    "conv1d-grouped": GROUPED,
    "conv2d-grouped": GROUPED,
    "conv2d-depthwise": GROUPED,
}
SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=8, alpha=8.0), dict(rank=4, rank_stabilized=True)]
PLACES = [host.name for host in (*LINEARS, *CONVOLUTIONS)] + [
    "embedding",
    "embedding-padding",
    "attention",
    "raw-kernel",
    "raw-stack",
    "raw-stack-transposed",
]
CASES = cases("lora", PLACES, SETTINGS, WRONG)
