"""VeRA; A and B of a seed are PEFT's to the bit, so nothing frozen is copied."""

from __future__ import annotations

from typing import Any

from peft import VeraConfig
from torch import nn

from deltatune.injection.delta import Delta
from deltatune.methods import VeRA
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import LINEARS
from tests.methods.oracles.table import Oracle, cases


def config(rank: int, seed: int = 0, **targets: Any) -> VeraConfig:
    return VeraConfig(r=rank, projection_prng_key=seed, **targets)


def names(tensor: str, site: Site) -> str:
    return f"vera_lambda_{tensor}.default"


def same_bases(delta: Delta, theirs: nn.Module) -> None:
    assert isinstance(delta.shared, nn.Module)
    assert theirs.base_model.vera_A["default"].equal(delta.shared.A)  # type: ignore[union-attr, operator]
    assert theirs.base_model.vera_B["default"].equal(delta.shared.B)  # type: ignore[union-attr, operator]


SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=32), dict(rank=8, seed=7)]
ORACLE = Oracle(lambda rank, seed=0: VeRA(rank=rank, seed=seed), config, names, settle=same_bases)
CASES = cases("vera", [host.name for host in LINEARS], SETTINGS)
