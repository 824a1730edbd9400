"""OFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import OFTConfig
from torch import Tensor, nn

from deltatune.methods import OFT, Method
from deltatune.structure.site import Site
from tests.methods.oracles.table import Oracle, OtherTensors, Wrong, cases


def config(block_size: int, block_share: bool = False, neumann_terms: int | None = None, **targets: Any) -> OFTConfig:
    series = dict(use_cayley_neumann=neumann_terms is not None, num_cayley_neumann_terms=neumann_terms or 5)
    return OFTConfig(oft_block_size=block_size, block_share=block_share, **series, **targets)  # type: ignore[arg-type]


def names(tensor: str, site: Site) -> str:
    return f"{'oft_embedding_R' if isinstance(site.module, nn.Embedding) else 'oft_R'}.default.weight"


def formula(theta: Tensor, tensors: Mapping[str, Tensor], site: Site, method: Method) -> Tensor:
    """W R^T with R = diag(R_1, ..., R_k), written out."""
    assert isinstance(method, OFT)
    stored = theta if theta.ndim == 3 and site.parameter else theta[None]
    matrices = (stored.mT if site.transposed else stored).flatten(2)
    size, vectors = method.block_size, tensors["rotation.Q"].reshape(stored.shape[0], -1, tensors["rotation.Q"].shape[-1])
    rows, columns = torch.triu_indices(size, size, 1)
    turned = []
    for W, blocks in zip(matrices, vectors, strict=True):
        R = []
        for k in range(W.shape[1] // size):
            Q = torch.zeros(size, size).index_put((rows, columns), blocks[k % len(blocks)])
            Q = Q - Q.T
            R.append(
                by_series(Q, method.neumann_terms)
                if method.neumann_terms
                else (torch.eye(size) - Q) @ torch.linalg.inv(torch.eye(size) + Q)
            )
        turned.append(W @ torch.block_diag(*R).T)
    found = torch.stack(turned)
    return (found.mT if site.transposed else found).reshape(theta.shape)


def by_series(Q: Tensor, terms: int) -> Tensor:
    powers = [torch.linalg.matrix_power(Q, k) for k in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1], torch.zeros_like(Q)) + powers[-1]


ORACLE = Oracle(OFT, config, names, formula)
OVERLAP = Wrong("PEFT cuts the image into patches, rotates them and adds up where they overlap, and so changes it even with R = I")
SQUARE = Wrong("PEFT takes the kernel (3, 2) for a square one: its blocks are others, or do not fit", (OtherTensors, RuntimeError))
WRONG = {"conv2d": OVERLAP, "conv2d-strided": SQUARE} | dict.fromkeys(
    ("transposed", "conv1d", "raw-stack", "raw-stack-transposed"), Wrong("PEFT's OFT does not take it", TypeError)
)
PLACES = ("mlp", "mlp-no-bias", "mlp-sequence", "bert", "llama", "t5", "conv2d-1x1", "embedding")
SETTINGS: list[dict[str, Any]] = [dict(block_size=4), dict(block_size=2, block_share=True), dict(block_size=4, neumann_terms=5)]
CASES = [
    *cases("oft", PLACES, [*SETTINGS, dict(block_size=4, neumann_terms=7, block_share=True)]),
    *cases("oft", WRONG, SETTINGS[1:], WRONG),
]
