"""VeRA; A and B of a seed are PEFT's to the bit, so nothing frozen is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import VeraConfig
from torch import Tensor, nn

from deltatune.injection.delta import Delta
from deltatune.methods import Method, VeRA
from deltatune.structure.site import Site
from tests.methods.oracles.hosts import LINEARS
from tests.methods.oracles.table import Oracle, Wrong, cases


def config(rank: int, seed: int = 0, **targets: Any) -> VeraConfig:
    return VeraConfig(r=rank, projection_prng_key=seed, **targets)


def names(tensor: str, site: Site) -> str:
    return f"vera_lambda_{tensor}.default"


def same_bases(delta: Delta, theirs: nn.Module) -> None:
    assert isinstance(delta.shared, nn.Module)
    assert theirs.base_model.vera_A["default"].equal(delta.shared.A)  # type: ignore[union-attr, operator]
    assert theirs.base_model.vera_B["default"].equal(delta.shared.B)  # type: ignore[union-attr, operator]


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    """W + diag(b) B diag(d) A, matrix by matrix, with A and B drawn anew: B row by row, so a short one is how a long one begins."""
    assert isinstance(method, VeRA)
    stored = theta if theta.ndim == 3 and site.parameter else theta[None]
    matrices = (stored.mT if site.transposed else stored).flatten(2)
    generator = torch.Generator().manual_seed(method.seed)
    bases = []
    for shape in ((method.rank, matrices.shape[2]), (matrices.shape[1], method.rank)):
        bound = (6 / shape[1]) ** 0.5
        bases.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    A, B = bases
    d, b = tensors["d"].view(len(matrices), -1), tensors["b"].view(len(matrices), -1)
    found = torch.stack([W + torch.diag(b[k]) @ B @ torch.diag(d[k]) @ A for k, W in enumerate(matrices)])
    return (found.mT if site.transposed else found).reshape(theta.shape)


SETTINGS: list[dict[str, Any]] = [dict(rank=4), dict(rank=32), dict(rank=8, seed=7)]
ALONE = "PEFT's VeRA takes linears alone"
PLACES = ("conv1d", "conv2d", "conv3d", "conv2d-grouped", "embedding", "attention")
RAW = ("raw-kernel", "raw-stack", "raw-stack-transposed")
WRONG = dict.fromkeys(PLACES, Wrong(ALONE, ValueError)) | dict.fromkeys(RAW, Wrong(ALONE, TypeError))
ORACLE = Oracle(lambda rank, seed=0: VeRA(rank=rank, seed=seed), config, names, formula, settle=same_bases)
CASES = cases("vera", [host.name for host in LINEARS], SETTINGS) + cases("vera", WRONG, SETTINGS[:1], WRONG)
