"""DID: training in a random subspace of all weights, to measure the intrinsic dimension of a task (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.reparameterization.random_projection import PROJECTIONS
from deltatune.methods.reparameterization.random_projection import Kind as Projecting
from deltatune.methods.reparameterization.subspace import Subspace, check_size, differences, parts
from deltatune.structure.site import Site


@methods.register("did")
@dataclass(frozen=True)
class DID(Method):
    """theta^D = theta_0^D + P(theta^d), with a fixed random P: R^d -> R^D and theta^d = 0 at the start.

    Trains theta^d: (dimension,), one vector for the whole backbone. As in the official code, each parameter has a block
    P_i of its own, normalised for itself and applied to all of theta^d. P is drawn from ``seed`` and the parameter's
    name, and never stored. The default places are all parameters of the layers; ``where="*"`` adds the embeddings,
    whose P is by far the largest. A task head trains in full beside it.

    Args:
        dimension: d, at least 1.
        projection: ``fastfood``, ``dense`` or ``sparse``.
        seed: of P.

    Raises:
        InvalidValue: a field out of its range.
        Unsupported: P would be too large.
    """

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attention.*", "feed_forward.*?", "experts.*?", "norm?")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:1804.08838"

    dimension: int = 20_000
    projection: Projecting = "fastfood"
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "dimension")
        one_of(self, "projection", tuple(PROJECTIONS))

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """theta^d."""
        sizes = [theta.numel() for _, _, theta in parts(sites).values()]
        check_size(self, self.projection, sizes, self.dimension)
        return Subspace(self.dimension, {}).to(sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One difference for each parameter of the site."""
        assert isinstance(shared, Subspace)
        return differences(site, self.projection, self.seed, shared)
