"""Sums of Kronecker products, W = sum_{i=1..n} A_i (x) B_i: the matrices of PHM adapters and of Compacter.

Where n does not divide a width, the B_i are rounded up and the last rows or columns of W are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """sum_i A_i (x) B_i for A (n, p, q) and B (n, r, s): (p r, q s)."""
    p, r, q, s = A.shape[1], B.shape[1], A.shape[2], B.shape[2]
    return torch.einsum("ipq,irs->prqs", A, B).reshape(p * r, q * s)


def fresh_rule(n: int) -> Tensor:
    """A_1, ..., A_n: (n, n, n), normal with variance 1 / n."""
    return torch.randn(n, n, n) / math.sqrt(n)
