"""Selective modules: a random choice of whole modules trains, up to a share of the parameters (Ding et al. 2023)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.methods.checks import proportion
from deltatune.methods.kinds import Family, Kind, Method, Patch, SelectionPatch, methods
from deltatune.structure.site import LayerList, Site


@methods.register("selective-modules")
@dataclass(frozen=True)
class SelectiveModules(Method):
    """theta_i' = theta_i + delta theta_i for i in W, W = the parameters of modules drawn at random; |W| <= share * |layers|.

    Trains in place. In the order of a draw from ``seed`` and their paths, modules are taken while they fit into what is
    left of the budget; each list of layers (encoder, decoder) has its own, and takes its smallest module if none fits. What lies
    outside the layers stays.

    Args:
        budget: share of the parameters in the layers that may train, in (0, 1].
        seed: of the draw.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "selection"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2203.06904"

    budget: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        proportion(self, "budget")

    def share(self, sites: Sequence[Site]) -> nn.Module:
        """Draw the modules. From the chosen ones alone, as a delta file names them, it draws the same ones."""
        modules: dict[LayerList, dict[str, dict[str, int]]] = {}
        claimed: set[int] = set()
        for site in sites:
            for name in site.parameters:
                tensor = site.module.get_parameter(name)
                if site.layer_list is not None and id(tensor) not in claimed:
                    claimed.add(id(tensor))
                    path = full_name(site, name)
                    modules.setdefault(site.layer_list, {}).setdefault(path.rpartition(".")[0], {})[path] = tensor.numel()
        return Drawn(frozenset(path for layers, found in modules.items() for path in self._draw(layers, found)))

    def _draw(self, layers: LayerList, modules: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Parameters of the modules drawn from one list of layers; ``modules``: path -> path of a parameter -> its size."""
        drawn: list[str] = []
        left = self.budget * layers.size
        for path in sorted(modules, key=lambda path: (zlib.crc32(f"{self.seed}/{path}".encode()), path)):
            size = sum(modules[path].values())
            if size <= left:
                left -= size
                drawn += modules[path]
        return drawn or list(modules[min(modules, key=lambda path: sum(modules[path].values()))])

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The parameters of a module that was drawn."""
        assert isinstance(shared, Drawn)
        return [SelectionPatch(name) for name in site.parameters if full_name(site, name) in shared.names]


class Drawn(nn.Module):
    """The full names of the chosen parameters; it holds no tensors."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names


def full_name(site: Site, parameter: str) -> str:
    """Path in the backbone of a parameter of the site."""
    return ".".join(part for part in (site.module_path, parameter) if part)
