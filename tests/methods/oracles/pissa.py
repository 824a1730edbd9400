"""PiSSA, of which PEFT takes B_0 A_0 off the weight and we run it beside; only the product is determined, not the signs of its factors."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from deltatune.injection.delta import Delta
from deltatune.methods import PiSSA
from deltatune.methods.reparameterization.pissa import PrincipalLinear
from tests.methods.oracles import lora
from tests.methods.oracles.hosts import LINEARS
from tests.methods.oracles.table import Oracle, cases


def config(rank: int, **targets: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa", **targets)


def same_start(delta: Delta, theirs: nn.Module) -> None:
    """W - B_0 A_0 is what PEFT left of each weight."""
    for entry in delta.entries:
        assert isinstance(entry.patch, PrincipalLinear)
        start = entry.patch.start_B @ entry.patch.start_A
        left = theirs.get_parameter(f"base_model.model.{entry.site.path}.base_layer.weight")
        torch.testing.assert_close(entry.site.weight - (start.T if entry.site.transposed else start), left, atol=1e-5, rtol=1e-5)


ORACLE = Oracle(lambda rank: PiSSA(rank=rank), config, lora.names, settle=same_start)
CASES = cases("pissa", [host.name for host in LINEARS], [dict(rank=2), dict(rank=5)])
