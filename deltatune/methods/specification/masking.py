"""Masking: a binary mask over frozen weights is learnt, and stored at one bit an entry (Zhao et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.checks import fraction, one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, WeightPatch, methods
from deltatune.structure.site import Site, is_packed

Init = Literal["scaled", "magnitude", "random"]


@methods.register("masking")
@dataclass(frozen=True)
class Masking(Method):
    """W' = W * 1[m > tau], * entry by entry; backward dL/dm = dL/dW' * W, straight through the threshold.

    Trains the scores m, of W's shape; W stays frozen. A share ``initial_sparsity`` of the entries is masked at the
    start, so a fresh delta is no identity unless that is 0. ``export`` leaves one bit an entry. It takes all layers; the
    paper leaves out the lowest two of twelve and adds BERT's pooler.

        scaled            m ~ U(-c, s), s = (c + tau) / initial_sparsity - c
        magnitude, random m = 0 for what is dropped, the smallest |W| or any, and 2 tau for what is kept

    Scores, their gradients and Adam moments are as large as W in fp32: training takes the memory of full fine-tuning.

    Args:
        threshold: tau.
        init: how scores start.
        initial_sparsity: share of the entries that is masked at the start, in [0, 1).
        scale: c, with ``init`` = scaled.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.*", "feed_forward.*?", "experts.*?")
    identity: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2004.12406"

    threshold: float = 1e-2
    init: Init = "scaled"
    initial_sparsity: float = 0.05
    scale: float = 2e-2

    def __post_init__(self) -> None:
        positive(self, "threshold", "scale")
        fraction(self, "initial_sparsity")
        one_of(self, "init", ("scaled", "magnitude", "random"))
        if self.init == "scaled" and self.initial_sparsity == 0:
            raise InvalidValue("Masking(init='scaled', initial_sparsity=0) was asked for; it needs a share greater than 0.")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One mask for each matrix of the site; vectors and a task head have none."""
        if site.leaf == "readout":
            return []
        parts = {name: site.part(site.module.get_parameter(name)) for name in site.parameters}
        return [MaskedWeight(name, self.scores(theta), self.threshold) for name, theta in parts.items() if theta.ndim > 1]

    @torch.no_grad()
    def scores(self, theta: Tensor) -> Tensor:
        """m at the start.

        Raises:
            Unsupported: magnitudes of a parameter that cannot be read.
        """
        c, tau = self.scale, self.threshold
        if self.init == "scaled":
            return torch.empty(theta.shape).uniform_(-c, (c + tau) / self.initial_sparsity - c)
        if self.init == "magnitude" and (theta.is_meta or is_packed(theta)):
            raise Unsupported(
                f"Masking(init='magnitude') was asked to read a parameter of shape {tuple(theta.shape)} that is "
                f"{'offloaded' if theta.is_meta else 'quantised'}. Load the backbone in memory and unquantised, or use init='scaled'."
            )
        size = theta.abs().float() if self.init == "magnitude" else torch.rand(theta.shape)
        m = torch.full((theta.numel(),), 2 * tau)
        dropped = round(self.initial_sparsity * theta.numel())
        m[size.reshape(-1).topk(dropped, largest=False).indices.to(m.device)] = 0
        return m.view(theta.shape)

    def parameter_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """No weight decay on the scores: it would mask everything in the end."""
        scores = {name: parameter for name, parameter in parameters.items() if name.rpartition(".")[2] == "m"}
        rest = [parameter for name, parameter in parameters.items() if name not in scores]
        return [{"params": rest, "lr": lr}, {"params": list(scores.values()), "lr": lr, "weight_decay": 0.0}]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Keep the bits."""
        for patch in patches:
            if isinstance(patch, MaskedWeight):
                patch.pack()

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every mask is stored as bits."""
        return all(patch.form == "packed" for patch in patches if isinstance(patch, MaskedWeight))


class MaskedWeight(WeightPatch):
    """theta * 1[m > tau] for one parameter, in one of two forms.

    Forms:
        scored: m of theta's shape.
        packed: ``bits`` (ceil(n / 8),), entry j of the flat mask being bit j % 8 of byte j // 8.
    """

    commutes = "multiply"
    m: nn.Parameter
    bits: Tensor

    def __init__(self, parameter: str, m: Tensor, threshold: float) -> None:
        super().__init__()
        self.parameter = parameter
        self.form = "scored"
        self.shape, self.threshold = m.shape, threshold
        self.m = nn.Parameter(m)

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        return theta * self.mask().to(theta.dtype)

    def mask(self) -> Tensor:
        """1[m > tau], with the gradient of m itself; of theta's shape."""
        if self.form == "packed":
            return unpacked(self.bits, self.shape.numel()).view(self.shape)
        return (self.m > self.threshold).to(self.m.dtype) + (self.m - self.m.detach())

    @torch.no_grad()
    def pack(self) -> None:
        """Go to the packed form."""
        if self.form == "packed":
            return
        bits = packed((self.m > self.threshold).reshape(-1))
        self._become_packed()
        self.bits.copy_(bits)

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Take the form with these tensors; see the class."""
        if "bits" in state and self.form == "scored":
            self._become_packed()

    def _become_packed(self) -> None:
        device = self.m.device
        del self.m
        self.register_buffer("bits", torch.zeros(-(-self.shape.numel() // 8), dtype=torch.uint8, device=device))
        self.form = "packed"


def packed(mask: Tensor) -> Tensor:
    """A flat boolean mask (n,) as bytes (ceil(n / 8),), lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, entries: int) -> Tensor:
    """The flat mask (n,) of 0 and 1 from its bytes."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts).bitwise_and(1).reshape(-1)[:entries]
