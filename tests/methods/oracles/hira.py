"""HiRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import HiraConfig
from torch import Tensor, nn

from deltatune.methods import HiRA, Method
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import CONVOLUTIONS, LINEARS
from tests.methods.oracles.table import Oracle, Wrong, cases


def config(rank: int, **targets: Any) -> HiraConfig:
    return HiraConfig(r=rank, **targets)


def names(tensor: str, site: Site) -> str:
    """PEFT sees an embedding as (width, rows), so that its A is our B."""
    if isinstance(site.module, nn.Embedding):
        return {"hira_A": "hira_embedding_B.default", "hira_B": "hira_embedding_A.default"}[tensor]
    return f"{tensor}.default"


def shaped(name: str, own: Tensor, theirs: Tensor) -> Tensor:
    return theirs.T if theirs.shape == own.T.shape and theirs.shape != own.shape else theirs.reshape(own.shape)


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    change = tensors["hira_B"] @ tensors["hira_A"]
    return theta + theta * (change.mT if site.transposed else change).reshape(theta.shape)


GROUPED = Wrong("PEFT refuses grouped convolutions", NotImplementedError)
WRONG = {
    "conv2d-circular": Wrong("PEFT pads the change with zeros"),
    "conv1d-grouped": GROUPED,
    "conv2d-grouped": GROUPED,
    "conv2d-depthwise": GROUPED,
    "attention": Wrong("PEFT refuses attention", ValueError),
    "raw-kernel": Wrong("PEFT refuses raw parameters", TypeError),
    "raw-stack": Wrong("PEFT refuses raw parameters", TypeError),
    "raw-stack-transposed": Wrong("PEFT refuses raw parameters", TypeError),
}
SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=32)]
ORACLE = Oracle(lambda rank: HiRA(rank=rank), config, names, formula, shaped)
PLACES = [host.name for host in (*LINEARS, *CONVOLUTIONS)] + ["embedding", "embedding-padding"]
RAW = ["attention", "raw-kernel", "raw-stack", "raw-stack-transposed"]
CASES = cases("hira", PLACES, SETTINGS, WRONG) + cases("hira", RAW, SETTINGS[:1], WRONG)
