"""AdaLoRA: LoRA as singular triplets, whose number at each site follows their importance (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.methods.checks import fraction, not_negative, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.methods.lanes import Lane
from deltatune.methods.reparameterization.matrix_view import MatrixView, acts_on_outputs
from deltatune.structure.site import Site

FACTORS = ("P", "Lambda", "Q")


@methods.register("adalora")
@dataclass(frozen=True)
class AdaLoRA(Method):
    """W' = W + s P diag(Lambda) Q with s = alpha / initial_rank, and gamma mean(||P^T P - I||_F, ||Q Q^T - I||_F) in the loss.

    Trains P: (out, r) and Q: (r, in), both N(0, 0.02^2), and Lambda: (r,) = 0. After each step the importance of every entry
    w is smoothed, and all triplets of all sites but the b(t) most important ones get Lambda_i = 0:

        I <- beta1 I + (1 - beta1) |w dL/dw|,   U <- beta2 U + (1 - beta2) | |w dL/dw| - I |
        S_i = (I U)(Lambda_i) + mean_j (I U)(P_ji) + mean_j (I U)(Q_ij)
        b(t) falls from initial_rank to rank a site between ``warmup_share`` and 1 - ``final_share``, as (1 - progress)^3

    Then the choice is fixed; ``export`` drops the triplets that were not chosen.

    Args:
        rank: triplets a site at the end, on average.
        initial_rank: r, triplets a site at the start, at least ``rank``.
        alpha: s = alpha / initial_rank, also after pruning.
        warmup_share: share of the steps ahead of the first pruning.
        final_share: share of the steps with a fixed choice.
        orthogonality: gamma, at least 0.
        beta1: smoothing of I.
        beta2: smoothing of U.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query", "attention.value")
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2303.10512"

    rank: int = 8
    initial_rank: int = 12
    alpha: float = 32.0
    warmup_share: float = 0.1
    final_share: float = 0.3
    orthogonality: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        not_negative(self, "orthogonality")
        fraction(self, "warmup_share", "final_share", "beta1", "beta2")
        if self.initial_rank < self.rank:
            raise InvalidValue(f"{self} was asked for; `initial_rank` must be at least `rank`, {self.rank}.")
        if self.warmup_share + self.final_share >= 1:
            raise InvalidValue(
                f"{self} was asked for; `warmup_share` and `final_share` must leave steps to prune in: less than 1 together."
            )

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One patch a site that has a matrix."""
        if not site.has_matrix:
            return []
        if acts_on_outputs(site):
            return [TripletLinear(Triplets((), site.out_features, site.in_features, self))]
        view = MatrixView.of(site)
        return [TripletWeight(view, Triplets(view.stack, view.rows, view.columns, self))]

    def penalty(self, patches: Sequence[Patch]) -> Tensor:
        """gamma times the mean distance of P^T P and Q Q^T from I, a scalar."""
        terms = [term for triplets in _triplets(patches) for term in triplets.distances()]
        return self.orthogonality * torch.stack(terms).mean() if terms and self.orthogonality else torch.zeros(())

    @torch.no_grad()
    def after_step(self, patches: Sequence[Patch], step: int, total: int) -> None:
        """Smooth the importance, and keep the b(t) most important triplets."""
        found = _triplets(patches)
        warm, end = round(total * self.warmup_share), total - round(total * self.final_share)
        if step < end:
            for triplets in found:
                triplets.observe(self.beta1, self.beta2)
        if warm < step <= end:
            _keep(found, self.budget(sum(triplets.kept.numel() for triplets in found), (step - warm) / (end - warm)))
        if warm < step:
            for triplets in found:
                triplets.Lambda.mul_(triplets.kept)

    def budget(self, at_start: int, progress: float) -> int:
        """b(t): how many of the ``at_start`` triplets stay, for a progress from 0 to 1."""
        final = round(at_start * self.rank / self.initial_rank)
        return int(final + (at_start - final) * (1 - progress) ** 3)

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Keep the chosen triplets only."""
        for patch in _patches(patches):
            if not patch.triplets.exported:
                patch.triplets = patch.triplets.pruned()

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every site holds its chosen triplets only."""
        return all(triplets.exported for triplets in _triplets(patches))


class Triplets(nn.Module):
    """P, Lambda and Q of one site, in one of two forms.

    Forms:
        in training: beside them I and U of each (``importance_P``, ``uncertainty_P``, ...), and ``kept``: (..., r), the choice.
        exported: the chosen triplets alone; a stack of matrices keeps those that one of them chose.
    """

    P: nn.Parameter
    Lambda: nn.Parameter
    Q: nn.Parameter
    kept: Tensor

    def __init__(self, stack: tuple[int, ...], rows: int, columns: int, method: AdaLoRA) -> None:
        super().__init__()
        r = method.initial_rank
        self.scale = method.alpha / r
        self.exported = False
        self.P = nn.Parameter(0.02 * torch.randn(*stack, rows, r))
        self.Lambda = nn.Parameter(torch.zeros(*stack, r))
        self.Q = nn.Parameter(0.02 * torch.randn(*stack, r, columns))
        self.register_buffer("kept", torch.ones(*stack, r, dtype=torch.bool))
        for name in FACTORS:
            for smoothed in ("importance", "uncertainty"):
                self.register_buffer(f"{smoothed}_{name}", torch.zeros_like(self._parameters[name]))  # type: ignore[arg-type]

    def change(self) -> Tensor:
        """s P diag(Lambda) Q, (..., out, in)."""
        return self.scale * (self.P * self.Lambda.unsqueeze(-2)) @ self.Q

    def distances(self) -> list[Tensor]:
        """||P^T P - I||_F and ||Q Q^T - I||_F, the mean of a stack."""
        identity = torch.eye(self.P.shape[-1], device=self.P.device, dtype=self.P.dtype)
        return [torch.linalg.matrix_norm(gram - identity).mean() for gram in (self.P.mT @ self.P, self.Q @ self.Q.mT)]

    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth |w dL/dw| of every entry into I, and its distance from I into U."""
        for name in FACTORS:
            w = self._parameters[name]
            assert w is not None
            if w.grad is None:
                continue
            sensitivity = (w * w.grad).abs()
            importance = self._smoothed("importance", name).lerp_(sensitivity, 1 - beta1)
            self._smoothed("uncertainty", name).lerp_((sensitivity - importance).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """S_i of each triplet, (..., r)."""
        P, Lambda, Q = (self._smoothed("importance", name) * self._smoothed("uncertainty", name) for name in FACTORS)
        return Lambda + P.mean(-2) + Q.mean(-1)

    def pruned(self) -> Triplets:
        """The exported form: outputs unchanged."""
        kept = self.kept.reshape(-1, self.kept.shape[-1]).any(0)
        return self._exported((self.P[..., kept], (self.Lambda * self.kept)[..., kept], self.Q[..., kept, :]))

    def reformed(self, rank: int) -> Triplets:
        """An exported form with ``rank`` triplets, values to be loaded."""
        P, Q = self.P, self.Q
        return self._exported(
            (P.new_zeros(*P.shape[:-1], rank), P.new_zeros(*P.shape[:-2], rank), P.new_zeros(*P.shape[:-2], rank, Q.shape[-1]))
        )

    def _exported(self, factors: tuple[Tensor, ...]) -> Triplets:
        other = Triplets.__new__(Triplets)
        nn.Module.__init__(other)
        other.scale, other.exported = self.scale, True
        for name, factor in zip(FACTORS, factors, strict=True):
            own = self._parameters[name]
            assert own is not None
            other.register_parameter(name, nn.Parameter(factor.detach().clone(), requires_grad=own.requires_grad))
        return other.train(self.training)

    def _smoothed(self, what: str, name: str) -> Tensor:
        buffer: Tensor = self.get_buffer(f"{what}_{name}")
        return buffer


class TripletLinear(OutputPatch):
    """y + s ((x Q^T) * Lambda) P^T."""

    commutes = "add"

    def __init__(self, triplets: Triplets) -> None:
        super().__init__()
        self.triplets = triplets

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., in), (..., out) -> (..., out)."""
        own = self.triplets
        h = F.linear(x.to(y.dtype), own.Q.to(y.dtype)) * own.Lambda.to(y.dtype)  # (..., r)
        return y + own.scale * F.linear(h, own.P.to(y.dtype))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Q, P diag(Lambda) and s."""
        own = self.triplets
        return own.Q, own.P * own.Lambda, own.scale

    def lane(self) -> Lane:
        """The factors."""
        A, B, scale = self.factors()
        return Lane("low-rank", {"A": A.T, "B": scale * B.T}, (0.0,))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s P diag(Lambda) Q."""
        return weight + self.triplets.change().to(weight.dtype), bias

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Take the form with these tensors."""
        self.triplets = _form_of(self.triplets, state)


class TripletWeight(WeightPatch):
    """theta + s P diag(Lambda) Q, with theta seen as one matrix (out, in), or as a stack of them."""

    commutes = "add"

    def __init__(self, view: MatrixView, triplets: Triplets) -> None:
        super().__init__()
        self.parameter, self.view, self.triplets = view.parameter, view, triplets

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta + self.view.write(self.triplets.change(), theta)

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Take the form with these tensors."""
        self.triplets = _form_of(self.triplets, state)


def _form_of(triplets: Triplets, state: Mapping[str, Tensor]) -> Triplets:
    """The form of a patch's state: the same, or exported with as many triplets as are in it."""
    if "triplets.P" not in state or "triplets.kept" in state:
        return triplets
    return triplets.reformed(state["triplets.P"].shape[-1])


def _patches(patches: Sequence[Patch]) -> list[TripletLinear | TripletWeight]:
    return [patch for patch in patches if isinstance(patch, TripletLinear | TripletWeight)]


def _triplets(patches: Sequence[Patch]) -> list[Triplets]:
    return [patch.triplets for patch in _patches(patches)]


def _keep(found: Sequence[Triplets], budget: int) -> None:
    """Choose the ``budget`` triplets of the highest scores, exactly: ties fall to the earlier one."""
    scores = torch.cat([triplets.scores().reshape(-1) for triplets in found])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:budget]] = True
    parts = torch.split(chosen, [triplets.kept.numel() for triplets in found])
    for triplets, part in zip(found, parts, strict=True):
        triplets.kept.copy_(part.view(triplets.kept.shape))
