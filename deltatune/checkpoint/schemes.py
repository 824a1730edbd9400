"""The arithmetic of deltas: what becomes of several changes tau_1 ... tau_n of the same things, with weights w_1 ... w_n.

A change is a table of tensors. Low-rank changes s B A are summed in their factors, which is exact, and brought to a smaller
rank by a singular value decomposition, which is the nearest of that rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Merge = Callable[[Sequence[Tensors], Sequence[float], float, int], dict[str, Tensor]]
Factors = tuple[Tensor, Tensor]
"""B: (..., out, r) and A: (..., r, in); the scale is in B."""


@dataclass(frozen=True)
class Scheme:
    """A way to combine.

    Attributes:
        merge: of changes, weights, density and seed.
        linear: it is their weighted sum, so factors need not be multiplied out.
        grows: low-rank changes keep all of their ranks, unless another is asked for.
        of_factors: it means something for low-rank changes alone.
    """

    merge: Merge
    linear: bool = False
    grows: bool = False
    of_factors: bool = False


def weighted_sum(taus: Sequence[Tensors], weights: Sequence[float], density: float, seed: int) -> dict[str, Tensor]:
    """tau = sum_i w_i tau_i (Ilharco et al. 2022, arXiv:2212.04089)."""
    return {name: torch.stack([w * tau[name] for w, tau in zip(weights, taus, strict=True)]).sum(0) for name in taus[0]}


def ties(taus: Sequence[Tensors], weights: Sequence[float], density: float, seed: int) -> dict[str, Tensor]:
    """Trim, elect signs, merge those that agree (Yadav et al. 2023, arXiv:2306.01708).

    t_i = tau_i where |tau_i| is among the ``density`` share of its largest entries, over all tensors together, else 0
    g = sign(sum_i t_i)
    tau = sum_{i: sign(t_i) = g} w_i t_i / #{i: sign(t_i) = g}
    """
    trimmed = [_trimmed(tau, density) for tau in taus]
    return {name: _agreeing(torch.stack([tau[name] for tau in trimmed]), weights) for name in taus[0]}


def _trimmed(tau: Tensors, density: float) -> dict[str, Tensor]:
    sizes = torch.cat([tensor.abs().reshape(-1) for tensor in tau.values()])
    if not len(sizes):
        return dict(tau)
    least = sizes.topk(max(1, int(density * len(sizes)))).values[-1]
    return {name: torch.where(tensor.abs() >= least, tensor, 0) for name, tensor in tau.items()}


def _agreeing(t: Tensor, weights: Sequence[float]) -> Tensor:
    """The mean of w_i t_i over those with the elected sign; t: (n, ...)."""
    g = torch.where(t.sum(0) >= 0, 1.0, -1.0)
    agree = t.sign() == g  # zeros agree with nobody
    w = t.new_tensor(weights).view(-1, *[1] * (t.ndim - 1))
    return (w * t * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(taus: Sequence[Tensors], weights: Sequence[float], density: float, seed: int) -> dict[str, Tensor]:
    """Drop and rescale, then add (Yu et al. 2023, arXiv:2311.03099).

    m_i ~ Bernoulli(density) for each entry, tau = sum_i w_i m_i tau_i / density

    Each tensor of each change draws on its own, from ``seed``, its name and its number, on any device the same.
    """
    kept = [{name: _dropped(tensor, density, f"{seed}/{k}/{name}") for name, tensor in tau.items()} for k, tau in enumerate(taus)]
    return weighted_sum(kept, weights, density, seed)


def _dropped(tau: Tensor, density: float, place: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    m = torch.rand(tau.shape, generator=generator, dtype=torch.float64).to(tau.device) < density
    return tau * m / density


SCHEMES: dict[str, Scheme] = {
    "linear": Scheme(weighted_sum, linear=True, grows=True),
    "task_arithmetic": Scheme(weighted_sum, linear=True, grows=True),
    "cat": Scheme(weighted_sum, linear=True, grows=True, of_factors=True),
    "svd": Scheme(weighted_sum, linear=True, of_factors=True),
    "ties": Scheme(ties),
    "dare": Scheme(dare),
}
"""Name -> scheme."""


def concatenated(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """B = [w_1 B_1 ... w_n B_n], A = [A_1; ...; A_n]: then B A = sum_i w_i B_i A_i, of rank r_1 + ... + r_n."""
    return torch.cat([w * B for w, (B, _) in zip(weights, factors, strict=True)], -1), torch.cat([A for _, A in factors], -2)


def truncated(change: Factors | Tensor, rank: int) -> Factors:
    """The nearest B A of that rank: the ``rank`` largest singular values of the change, half of each in B and in A.

    Args:
        change: factors, which are never multiplied out, or a matrix (..., out, in).
        rank: r; filled up with zeros where the change has fewer.
    """
    if isinstance(change, Tensor):
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    else:
        Q_B, R_B = torch.linalg.qr(change[0])
        Q_A, R_A = torch.linalg.qr(change[1].mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        U, Vh = Q_B @ U, Vh @ Q_A.mT
    root = S[..., :rank].sqrt()
    B, A = U[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh[..., :rank, :]
    return padded((B, A), rank)


def padded(factors: Factors, rank: int) -> Factors:
    """The same change with as many columns of B and rows of A as asked for."""
    B, A = factors
    lacking = rank - A.shape[-2]
    if lacking <= 0:
        return factors
    return torch.nn.functional.pad(B, (0, lacking)), torch.nn.functional.pad(A, (0, 0, 0, lacking))
