"""SAID: a random subspace of all weights with a learned scale for each layer (Aghajanyan et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from deltatune.errors import Unsupported
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.reparameterization.random_projection import PROJECTIONS
from deltatune.methods.reparameterization.random_projection import Kind as Projecting
from deltatune.methods.reparameterization.subspace import Subspace, check_size, differences, parts
from deltatune.structure.site import Site


@methods.register("said")
@dataclass(frozen=True)
class SAID(Method):
    """theta_i = theta_{0,i} + lambda_i P(theta^{d-m})_i, with a fixed random P, theta^{d-m} = 0 and lambda = 1 at the start.

    Trains theta^{d-m} and m scales lambda, d = ``dimension`` numbers in all. As in the official code, each parameter has
    a block P_i of its own, normalised for itself and applied to all of theta^{d-m}. P is drawn from ``seed`` and the
    parameter's name, and never stored. The default places are all parameters of the layers; ``where="*"`` adds the
    embeddings, whose P is by far the largest. A task head trains in full beside it.

    Args:
        dimension: d, more than m.
        scale_per: one lambda for each ``parameter``, as in the official code, or for each ``layer``, as in the paper; what
            lies outside the layers shares one.
        projection: ``fastfood``, ``dense`` or ``sparse``.
        seed: of P.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: P would be too large, or m leaves nothing for theta.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.*", "feed_forward.*?", "experts.*?", "norm?")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2012.13255"

    dimension: int = 20_000
    scale_per: Literal["parameter", "layer"] = "parameter"
    projection: Projecting = "fastfood"
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "dimension")
        one_of(self, "projection", tuple(PROJECTIONS))
        one_of(self, "scale_per", ("parameter", "layer"))

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """theta^{d-m} and lambda."""
        found = parts(sites)
        names = {key: key if self.scale_per == "parameter" else _layer_of(site) for key, (site, _, _) in found.items()}
        order = {name: position for position, name in enumerate(sorted(set(names.values())))}
        free = self.dimension - len(order)
        if free < 1:
            raise Unsupported(
                f"{self} spends {len(order)} of its dimensions on one scale for each {self.scale_per} and has none left. "
                f"Choose dimension={len(order) + 1} or more, or scale_per='layer'."
            )
        check_size(self, self.projection, [theta.numel() for _, _, theta in found.values()], free)
        return Subspace(free, {key: order[name] for key, name in names.items()}).to(sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One difference for each parameter of the site."""
        assert isinstance(shared, Subspace)
        return differences(site, self.projection, self.seed, shared)


def _layer_of(site: Site) -> str:
    """Path of the layer the site lies in, so that encoder and decoder count apart; empty outside the layers."""
    path = site.path.split(".")
    return ".".join(path[: path.index(str(site.layer)) + 1]) if str(site.layer) in path else ""
