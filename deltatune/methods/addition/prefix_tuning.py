"""Prefix tuning: virtual keys and values in every attention (Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.addition.prefix import Prefix, SharedLayer, are_exported, export_prefixes, key_value_shape
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("prefix-tuning")
@dataclass(frozen=True)
class PrefixTuning(Method):
    """K <- [P_k; K], V <- [P_v; V] with P_k, P_v: (key_value_heads, num_virtual_tokens, head_dim) of their own in every attention.

    Trains E and the MLP that makes [P_k; P_v] = tanh(E W_1 + c_1) W_2 + c_2, with E and W_1 shared by all sites and
    one W_2 per site, because P itself is hard to optimise; ``export`` keeps P alone. Without ``reparameterization`` it
    trains P.

    Args:
        num_virtual_tokens: l.
        reparameterization: train through the MLP.
        mid_dim: width of E and of the MLP's hidden layer.
        init_std: standard deviation of a fresh P without reparameterization.
        placed: the virtual keys take the positions ahead of the text. Else they have none, as in OpenDelta and the adapters
            library, and the text's positions begin at 0.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("attention",)
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-4
    source: ClassVar[str] = "arXiv:2101.00190"

    num_virtual_tokens: int = 20
    reparameterization: bool = True
    mid_dim: int = 512
    init_std: float = 0.02
    placed: bool = True

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "mid_dim", "init_std")

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """E, W_1 and c_1; None without reparameterization."""
        return SharedLayer(self).to(sites[0].device) if self.reparameterization else None

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prefix an attention."""
        return [Prefix(*key_value_shape(site), self, shared, placed=self.placed)]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Replace the MLP by the P it makes."""
        export_prefixes(patches, shared)

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every patch holds its P."""
        return are_exported(patches)
