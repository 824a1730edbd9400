"""AdapterDrop: no adapters in the lowest layers, and one adapter for all layers (Rücklé et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, Serial, dense_bottleneck
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, methods
from deltatune.structure.site import Site


@methods.register("adapter-drop")
@dataclass(frozen=True)
class AdapterDrop(Method):
    """h <- h + f(h W_d + b_d) W_u + b_u in layers k, k + 1, ... and h <- h below, behind attention and feed-forward network.

    W_d: (d, r) ~ N(0, 0.01^2), W_u: (r, d) = 0: Houlsby's adapters, a fresh one the identity to the bit. Trains W_d, b_d,
    W_u, b_u. With a fixed k there is nothing below layer k, so neither a backward goes there. With ``random`` every
    layer has its adapter, k is drawn anew from 0, ..., L - 1 for each training forward, and evaluation drops
    ``drop_layers``: any number then, by setting ``delta.shared.drop_layers``.

    Args:
        bottleneck_dim: r, at least 1.
        activation: f; ``gelu_new`` is GELU's approximation by tanh.
        drop_layers: k, less than the number of layers L; 0 drops none. None: 5 L / 12, rounded down, after the paper's 5 of 12.
        random: draw k in training.
        shared: one adapter a role, for all its layers.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "adapter-like"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.output?", "feed_forward.down?")
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2010.11918"

    bottleneck_dim: int = 64
    activation: Activation = "gelu"
    drop_layers: int | None = None
    random: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        positive(self, "bottleneck_dim")
        one_of(self, "activation", tuple(ACTIVATIONS))
        if self.drop_layers is not None and self.drop_layers < 0:
            raise InvalidValue(f"AdapterDrop(drop_layers={self.drop_layers}) was asked for; `drop_layers` must be at least 0.")

    def share(self, sites: Sequence[Site]) -> nn.Module | None:
        """k, and the adapters that several layers share.

        Raises:
            InvalidValue: no layer would keep its adapter.
        """
        depths = [site.layer_list.depth for site in sites if site.layer_list is not None]
        k = 5 * min(depths, default=0) // 12 if self.drop_layers is None else self.drop_layers
        if depths and k >= min(depths):
            raise InvalidValue(
                f"AdapterDrop(drop_layers={k}) was asked for on {min(depths)} layers, so none would keep its adapter. "
                f"Drop at most {min(depths) - 1}."
            )
        common = Common(k, max(depths, default=1))
        for site in sites if self.shared else ():
            if _has_adapter(site) and _place(site) not in common.adapters:
                common.adapters[_place(site)] = dense_bottleneck(site.out_features, self.bottleneck_dim, self.activation)
        return common.to(sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One adapter a site that has a matrix, as wide as what the site returns; none where it is always dropped, or at a task head."""
        assert isinstance(shared, Common)
        layer = shared.depth if site.layer is None else site.layer  # what lies outside the layers is never dropped
        if not _has_adapter(site) or (layer < shared.drop_layers and not self.random):
            return []
        own = dense_bottleneck(site.out_features, self.bottleneck_dim, self.activation)
        adapter = Borrowed(shared.adapters[_place(site)]) if self.shared else own
        return [Droppable(adapter, layer, shared) if self.random else Serial(adapter)]


class Common(nn.Module):
    """What all sites have in common.

    Attributes:
        drop_layers: k outside of training.
        depth: L.
        k: layers below it are dropped in this training forward, ().
        adapters: the shared ones, by role and width.
    """

    k: Tensor

    def __init__(self, drop_layers: int, depth: int) -> None:
        super().__init__()
        self.drop_layers, self.depth = drop_layers, depth
        self.register_buffer("k", torch.zeros((), dtype=torch.int64), persistent=False)
        self.adapters = nn.ModuleDict()

    def draw(self) -> None:
        """k ~ U{0, ..., L - 1}."""
        self.k.copy_(torch.randint(self.depth, (), device=self.k.device))


class Borrowed(nn.Module):
    """A module of the delta's, used at one of its sites."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is no child: the delta owns it

    def forward(self, h: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self._module[0](h)  # type: ignore[no-any-return]

    @property
    def lent(self) -> nn.Module:
        """The module."""
        return self._module[0]


class Droppable(OutputPatch):
    """y + U(f(D(y))), or y where the layer is dropped."""

    def __init__(self, bottleneck: nn.Module, layer: int, common: Common) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.layer = layer
        self._common = (common,)

    def draw(self) -> None:
        """Draw k, for all sites; the last to draw has its way."""
        self._common[0].draw()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        common = self._common[0]
        if self.training:
            return torch.where(common.k.to(y.device) <= self.layer, y + self.bottleneck(y), y)
        return y + self.bottleneck(y) if self.layer >= common.drop_layers else y


def _has_adapter(site: Site) -> bool:
    return site.has_matrix and site.leaf != "readout"


def _place(site: Site) -> str:
    return f"{site.role or 'site'}_{site.out_features}".replace(".", "_")
