"""Diff pruning: a sparse difference found by an L0 relaxation (Guo et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.methods.checks import fraction, not_negative, positive, proportion
from deltatune.methods.kinds import Family, Kind, Method, Patch, Phase, WeightPatch, methods
from deltatune.methods.specification.sparse import added, index_type, largest
from deltatune.structure.site import Site

LEFT, RIGHT = -1.5, 1.5  # l and r: the hard-concrete gate is stretched to (l, r) and clipped to [0, 1]


@methods.register("diff-pruning")
@dataclass(frozen=True)
class DiffPruning(Method):
    """theta' = theta + z * w, with a hard-concrete gate z per entry and lambda * E[number of open gates] in the loss.

        u ~ U(0, 1),  s = sigmoid(log u - log(1 - u) + alpha),  z = min(1, max(0, s (r - l) + l))
        penalty = lambda sum sigmoid(alpha - log(-l / r))

    Three steps: train w and alpha; keep the ``density`` share of entries with the largest |z w| over all parameters;
    fine-tune those with the mask fixed. ``export`` leaves positions and values. With ``structured``, each parameter
    has one more gate that all its entries share: z = z_i z_g.

    Args:
        density: share of entries that may differ in the end, in (0, 1].
        penalty_weight: lambda.
        alpha_init: alpha at the start; 5 is nearly always open.
        alpha_learning_rate: learning rate of the gates.
        structured: one more gate per parameter.
        fine_tune_share: share of the steps with the mask fixed, in [0, 1).

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 3e-4
    source: ClassVar[str] = "arXiv:2012.07463"

    density: float = 0.005
    penalty_weight: float = 1.25e-7
    alpha_init: float = 5.0
    alpha_learning_rate: float = 0.1
    structured: bool = False
    fine_tune_share: float = 0.4

    def __post_init__(self) -> None:
        proportion(self, "density")
        fraction(self, "fine_tune_share")
        not_negative(self, "penalty_weight")
        positive(self, "alpha_learning_rate")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One difference for each parameter of the site; a task head trains in full beside them."""
        if site.leaf == "readout":
            return []
        module = site.module
        return [GatedDifference(name, site.part(module.get_parameter(name)), self) for name in site.parameters]

    def penalty(self, patches: Sequence[Patch]) -> Tensor:
        """lambda sum sigmoid(alpha - log(-l / r)), a scalar; 0 once the mask is fixed."""
        terms = [patch.open_gates() for patch in patches if isinstance(patch, GatedDifference) and patch.form == "gated"]
        return self.penalty_weight * torch.stack(terms).sum() if terms else torch.zeros(())

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """The gates at their own rate, the differences (and a head) at ``lr``; no weight decay on the gates."""
        gates = [parameter for name, parameter in parameters.items() if name.rpartition(".")[2] in ("alpha", "alpha_g")]
        known = {id(gate) for gate in gates}
        rest = [parameter for parameter in parameters.values() if id(parameter) not in known]
        return [{"params": rest, "lr": lr}, {"params": gates, "lr": self.alpha_learning_rate, "weight_decay": 0.0}]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Find the mask, then train under it."""
        return Phase("gate", 1 - self.fine_tune_share), Phase("fine-tune", self.fine_tune_share)

    def enter(self, patches: Sequence[Patch], phase: str) -> None:
        """Prune to the exact budget when fine-tuning begins."""
        if phase == "fine-tune":
            prune([patch for patch in patches if isinstance(patch, GatedDifference)], self.density)

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Keep positions and values only; prunes first where training stopped early."""
        differences = [patch for patch in patches if isinstance(patch, GatedDifference)]
        if any(patch.form == "gated" for patch in differences):
            prune(differences, self.density)
        for patch in differences:
            patch.to_sparse()

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every difference is stored sparsely."""
        return all(patch.form == "sparse" for patch in patches if isinstance(patch, GatedDifference))


class GatedDifference(WeightPatch):
    """theta + z * w for one parameter, in one of three forms.

    Forms:
        gated: w, alpha (and alpha_g) of theta's shape; z drawn in training, at its median in evaluation.
        masked: the same with a fixed ``mask``; only w trains.
        sparse: ``index`` (k,) into the flat theta and ``values`` (k,).
    """

    commutes = "add"
    w: nn.Parameter
    alpha: nn.Parameter
    noise: Tensor
    noise_g: Tensor
    mask: Tensor
    index: Tensor
    values: nn.Parameter

    def __init__(self, parameter: str, theta: Tensor, method: DiffPruning) -> None:
        super().__init__()
        self.parameter = parameter
        self.form = "gated"
        self.entries = theta.numel()
        self.w = nn.Parameter(torch.zeros(theta.shape))
        self.alpha = nn.Parameter(torch.full(theta.shape, method.alpha_init))
        self.alpha_g = nn.Parameter(torch.full((1,), method.alpha_init)) if method.structured else None
        self.register_buffer("noise", torch.full(theta.shape, 0.5), persistent=False)
        self.register_buffer("noise_g", torch.full((1,), 0.5), persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        if self.form == "sparse":
            return added(theta, self.index, self.values)
        return theta + (self.gate() * self.w).to(theta.dtype)

    def gate(self) -> Tensor:
        """z, of theta's shape."""
        if self.form == "masked":
            return self.mask.to(self.w.dtype)
        z = self._hard_concrete(self.alpha, self.noise)
        return z if self.alpha_g is None else z * self._hard_concrete(self.alpha_g, self.noise_g)

    def _hard_concrete(self, alpha: Tensor, u: Tensor) -> Tensor:
        draw = torch.log(u) - torch.log(1 - u) if self.training else torch.zeros_like(alpha)
        s = torch.sigmoid(draw + alpha)
        return torch.clamp(s * (RIGHT - LEFT) + LEFT, 0, 1)

    def open_gates(self) -> Tensor:
        """E[number of non-zero z], a scalar."""
        shift = math.log(-LEFT / RIGHT)
        gates = torch.sigmoid(self.alpha - shift)
        if self.alpha_g is not None:
            gates = gates * torch.sigmoid(self.alpha_g - shift)
        return gates.sum()

    @torch.no_grad()
    def draw(self) -> None:
        """u ~ U(0, 1), away from the ends."""
        if self.form == "gated":
            self.noise.uniform_(1e-6, 1 - 1e-6)
            self.noise_g.uniform_(1e-6, 1 - 1e-6)

    @torch.no_grad()
    def difference(self) -> Tensor:
        """z * w with z at its median, of theta's shape."""
        training, self.training = self.training, False
        change = self.gate() * self.w
        self.training = training
        return change

    @torch.no_grad()
    def fix_mask(self, kept: Tensor) -> None:
        """Go to the masked form: w <- z w at the positions ``kept`` of the flat theta, 0 elsewhere."""
        difference = self.difference()
        self._become_masked()
        self.mask.view(-1)[kept] = True
        self.w.copy_(difference * self.mask)

    @torch.no_grad()
    def to_sparse(self) -> None:
        """Go to the sparse form: positions and values of the mask's open entries."""
        if self.form == "sparse":
            return
        index = self.mask.reshape(-1).nonzero().squeeze(1)
        values = self.w.reshape(-1)[index].clone()
        self._become_sparse(len(index))
        self.index.copy_(index)
        self.values.copy_(values)

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Take the form with these tensors; see the class."""
        if "values" in state:
            self._become_sparse(len(state["values"]))
        elif "mask" in state and self.form == "gated":
            self._become_masked()

    def _become_masked(self) -> None:
        self.register_buffer("mask", torch.zeros(self.w.shape, dtype=torch.bool, device=self.w.device))
        self.form = "masked"

    def _become_sparse(self, entries: int) -> None:
        device, size = next(self.parameters()).device, self.entries
        for name in [*self._parameters, *self._buffers]:
            delattr(self, name)
        self.register_buffer("index", torch.zeros(entries, dtype=index_type(size), device=device))
        self.values = nn.Parameter(torch.zeros(entries, device=device))
        self.form = "sparse"


def prune(differences: Sequence[GatedDifference], density: float) -> None:
    """Keep the share ``density`` of all entries with the largest |z w|, exactly: ties fall to the earlier entry."""
    kept = largest([patch.difference().abs() for patch in differences], density)
    for patch, positions in zip(differences, kept, strict=True):
        patch.fix_mask(positions)
