"""DoRA, with LoRA's and with rsLoRA's scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from deltatune.methods import DoRA, Method
from deltatune.structure.site import Site
from tests.methods.oracles import lora
from tests.methods.oracles.hosts import CONVOLUTIONS, LINEARS
from tests.methods.oracles.table import Oracle, OtherTensors, Wrong, cases


def config(rank: int, alpha: float = 3.0, rank_stabilized: bool = False, **targets: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rank_stabilized, use_dora=True, init_lora_weights=False, **targets)


def names(tensor: str, site: Site) -> str:
    if tensor == "magnitude":
        return "lora_magnitude_vector.default.weight"
    return lora.names(tensor, site)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    """The norm is a constant for the gradient."""
    assert isinstance(method, DoRA)
    W = theta.T if site.transposed or isinstance(site.module, nn.Embedding) else theta
    V = W.reshape(*tensors["lora_B"].shape[:-1], -1) + method.scale * tensors["lora_B"] @ tensors["lora_A"]
    changed = (tensors["magnitude"] / V.detach().norm(dim=-1, keepdim=True) * V).reshape(W.shape)
    return changed.T if W is not theta else changed


def dora(rank: int, alpha: float = 3.0, rank_stabilized: bool = False) -> DoRA:
    return DoRA(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)


GROUPED = Wrong("PEFT lets each group read every channel, which is no change of the convolution's weight", OtherTensors)
WRONG = {
    "conv2d-dilated": Wrong("PEFT's A forgets the dilation", RuntimeError),
    "conv2d-circular": Wrong("PEFT's A pads with zeros"),
    "conv1d-grouped": GROUPED,
    "conv2d-grouped": GROUPED,
    "conv2d-depthwise": GROUPED,
    "embedding-padding": Wrong("PEFT's B learns from padding tokens, which count for nothing in the table's gradient"),
    "attention": Wrong("PEFT refuses attention", ValueError),
    "raw-kernel": Wrong("PEFT refuses raw parameters", ValueError),
    "raw-stack": Wrong("PEFT refuses raw parameters", ValueError),
}
SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=8, alpha=8.0), dict(rank=4, rank_stabilized=True)]
ORACLE = Oracle(dora, config, names, formula)
PLACES = [host.name for host in (*LINEARS, *CONVOLUTIONS)] + ["embedding", "embedding-padding"]
CASES = cases("dora", PLACES, SETTINGS, WRONG) + cases("dora", ["attention", "raw-kernel", "raw-stack"], SETTINGS[:1], WRONG)
