"""P-tuning v2: deep prompts, virtual keys and values in every layer that train directly (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.addition.prefix import Prefix, SharedLayer, are_exported, export_prefixes, key_value_shape
from deltatune.methods.checks import fraction, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("p-tuning-v2")
@dataclass(frozen=True)
class PTuningV2(Method):
    """K <- [dropout(P_k); K], V <- [dropout(P_v); V] with P_k, P_v: (key_value_heads, num_virtual_tokens, head_dim) in every attention.

    Trains P_k and P_v ~ N(0, init_std^2), or with ``reparameterization`` the MLP of prefix tuning, which ``export`` drops;
    and the backbone's task head, as all methods do.

    Args:
        num_virtual_tokens: length of the prompt in each layer; the paper uses about 20 for simple tasks, 100 for hard ones.
        dropout: on P, in training.
        reparameterization: train through the MLP.
        mid_dim: width of the MLP's hidden layer.
        init_std: standard deviation of a fresh P without reparameterization.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("attention",)
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    source: ClassVar[str] = "arXiv:2110.07602"

    num_virtual_tokens: int = 20
    dropout: float = 0.1
    reparameterization: bool = False
    mid_dim: int = 512
    init_std: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "mid_dim", "init_std")
        fraction(self, "dropout")

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """The layer the prefixes are made from; None without reparameterization."""
        return SharedLayer(self).to(sites[0].device) if self.reparameterization else None

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prefix an attention."""
        return [Prefix(*key_value_shape(site), self, shared, self.dropout)]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Replace the MLP by the P it makes."""
        export_prefixes(patches, shared)

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every patch holds its P."""
        return are_exported(patches)
