"""Compacter++: Compacter behind the feed-forward network only (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.addition.compacter import SharedRule
from deltatune.methods.kinds import methods


@methods.register("compacter-plus-plus")
@dataclass(frozen=True)
class CompacterPlusPlus(SharedRule):
    """Compacter behind the feed-forward network only: h <- h + f(h W_d + b_d) W_u + b_u with half the parameters.

    W_d^T and W_u^T are sums over i of A_i (x) (s_i t_i^T); shapes, starts and what trains are Compacter's.

    Args:
        n: number of Kronecker products.
        reduction: d / r, at least 1.
        rank: rank of each s_i t_i^T; 1 in the paper.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.

    Raises:
        InvalidValue: a field out of its range.
    """

    where: ClassVar[tuple[str, ...]] = ("feed_forward.down",)
