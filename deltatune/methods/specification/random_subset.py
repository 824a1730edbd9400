"""Random subset: a fixed random choice of entries, rows or columns trains; the control of methods that choose with care."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.methods.checks import one_of, proportion
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.specification.sparse import SparseDifference
from deltatune.structure.site import Site

Part = Literal["entries", "rows", "columns"]


@methods.register("random-subset")
@dataclass(frozen=True)
class RandomSubset(Method):
    """theta' = theta + sum_{j=1..k} v_j e_{i_j} with positions i drawn once, k = density * |theta|; trains v = 0 at the start.

    An entry of v stands for one entry of theta; with ``part`` = rows, v_j is a row (one output) and k = density * out;
    with columns, a column (one input). Each parameter draws on its own, from ``seed`` and its path, so files hold v
    alone. A k between two whole numbers is rounded at random, so that small parameters get their share on average.

    Args:
        density: share of each parameter that trains, in (0, 1].
        part: what is drawn: entries, rows or columns; a bias has no columns.
        seed: of the draw.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2106.10199"

    density: float = 0.005
    part: Part = "entries"
    seed: int = 0

    def __post_init__(self) -> None:
        proportion(self, "density")
        one_of(self, "part", ("entries", "rows", "columns"))

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One difference for each parameter that gets positions; a task head trains in full beside them."""
        if site.leaf == "readout":
            return []
        patches = []
        for name in site.parameters:
            theta = site.part(site.module.get_parameter(name))
            axis = None if self.part == "entries" else _axis(site, theta, self.part)
            if self.part == "entries" or axis is not None:
                index = self._draw(f"{site.key}/{name}", theta.numel() if axis is None else theta.shape[axis])
                patches += [SparseDifference(name, theta, index, axis, stored=False)] if len(index) else []
        return patches

    def _draw(self, place: str, size: int) -> Tensor:
        """k of ``size`` positions, ascending."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{place}".encode()))
        k = min(size, int(self.density * size + float(torch.rand((), generator=generator))))
        return drawn(size, k, generator).sort().values


def drawn(size: int, k: int, generator: torch.Generator) -> Tensor:
    """k different positions below ``size``, uniform; a sparse draw does not permute them all."""
    if 4 * k < size:
        found: Tensor = torch.unique(torch.randint(size, (2 * k + 64,), generator=generator))
        if len(found) >= k:
            return found[torch.randperm(len(found), generator=generator)[:k]]
    return torch.randperm(size, generator=generator)[:k]


def _axis(site: Site, theta: Tensor, part: Part) -> int | None:
    """The axis that rows or columns are counted along; None where a parameter has none. Experts share theirs."""
    if theta.ndim == 1:
        return 0 if part == "rows" else None
    stacked = theta.ndim == 3 and not isinstance(site.module, nn.Conv1d)
    transposed = site.transposed or getattr(site.module, "is_transposed", False) is True
    return int(stacked) + int((part == "rows") == transposed)
