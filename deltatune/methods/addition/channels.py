"""How wide is what a site returns, a whole layer too."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltatune.structure.site import Site, modules_of


def channels(site: Site) -> int:
    """Width of what a site returns; 0 where nothing tells.

    A layer has no width of its own: its config, or the config of what is in it, tells, else its widest norm.
    """
    if site.parameter is not None:
        return 0
    if site.leaf != "layer":
        return site.out_features if site.has_matrix else 0
    inside = modules_of(site.module).values()
    configs: list[Any] = [getattr(module, "config", None) for module in inside]
    widths = [getattr(config, "hidden_size", None) for config in configs]
    norms = [module.weight.shape[0] for module in inside if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    return next((width for width in widths if isinstance(width, int)), max(norms, default=0))
