"""A vector theta^d for a whole backbone, and the difference P(theta^d) it makes in each parameter: what DID and SAID share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.kinds import Patch, WeightPatch
from deltatune.methods.reparameterization.random_projection import PROJECTIONS, Kind
from deltatune.structure.site import Site

MOST_ENTRIES = 2**28
"""Random numbers that all projections of a delta may hold together: 1 GiB, enough for Fastfood on 60 million parameters."""


class Subspace(nn.Module):
    """theta^d = 0, and a scale lambda = 1 for each group of parameters where there are groups.

    Attributes:
        groups: parameter -> position of its lambda.
    """

    def __init__(self, dimension: int, groups: Mapping[str, int]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))
        self.groups = dict(groups)
        if groups:
            self.scales = nn.Parameter(torch.ones(len(set(groups.values()))))


class ProjectedDifference(WeightPatch):
    """theta + lambda P(theta^d) for one parameter; lambda is 1 where the subspace has no groups."""

    commutes = "add"
    unroutable = "what it changes is as large as the weights, and made anew from one vector"

    def __init__(self, parameter: str, key: str, theta: Tensor, kind: Kind, seed: int, subspace: Subspace) -> None:
        super().__init__()
        self.parameter = parameter
        self.group = subspace.groups.get(key)
        self._subspace = (subspace,)  # in a tuple, so that it is no child: the delta owns it
        generator = torch.Generator().manual_seed(_seed_of(key, seed))
        self.P = PROJECTIONS[kind](theta.numel(), subspace.theta.numel(), generator)

    @property
    def shared(self) -> Subspace:
        """theta^d and lambda."""
        return self._subspace[0]

    def forward(self, theta: Tensor) -> Tensor:
        """theta -> theta', of the same shape."""
        change = self.P(self.shared.theta.to(theta.device))  # (D,)
        if self.group is not None:
            change = self.shared.scales[self.group].to(theta.device) * change
        moved: Tensor = theta + change.view(theta.shape).to(theta.dtype)
        return moved


def differences(site: Site, kind: Kind, seed: int, subspace: Subspace) -> list[Patch]:
    """One difference for each parameter of the site."""
    return [ProjectedDifference(name, key, theta, kind, seed, subspace) for key, (_, name, theta) in parts([site]).items()]


def parts(sites: Sequence[Site]) -> dict[str, tuple[Site, str, Tensor]]:
    """Key -> site, path below its module and values of each parameter, or role's rows of one, that a difference may go to.

    A task head trains in full beside them. A tied parameter stands under its first owner, a fused one that is hit as a
    whole not again under its roles.
    """
    found: dict[str, tuple[Site, str, Tensor]] = {}
    whole: set[int] = set()
    for site in sorted(sites, key=lambda site: site.rows is not None):
        for name in site.parameters if site.leaf != "readout" else ():
            theta = site.module.get_parameter(name)
            if id(theta) in whole:
                continue
            if site.rows is None:
                whole.add(id(theta))
            found[_key(site, name)] = site, name, site.part(theta)
    return found


def _key(site: Site, name: str) -> str:
    """Stable name of a parameter, or of the role's rows of it: what its projection is drawn for."""
    path = ".".join(part for part in (site.module_path, name) if part)
    return path if site.rows is None else f"{path}:{site.leaf}"


def check_size(method: object, kind: Kind, sizes: Sequence[int], dimension: int) -> None:
    """The projections fit into memory.

    Raises:
        Unsupported: they would hold more than ``MOST_ENTRIES`` numbers.
    """
    entries = sum(PROJECTIONS[kind].entries(size, dimension) for size in sizes)
    if entries > MOST_ENTRIES:
        way = "projection='fastfood', fewer dimensions" if kind != "fastfood" else "fewer dimensions"
        raise Unsupported(
            f"{method} would draw {entries:,} random numbers for {sum(sizes):,} parameters; {MOST_ENTRIES:,} are the most. "
            f"Choose {way}, or fewer sites."
        )


def _seed_of(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
