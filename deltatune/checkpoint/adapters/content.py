"""What an architecture of the adapters library is read from, and where its modules act in a backbone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_files import Fields
from deltatune.checkpoint.foreign_shapes import (
    Tensors,
    below,
)
from deltatune.errors import CheckpointError, Unsupported
from deltatune.registry import Registry
from deltatune.structure.index import Index
from deltatune.structure.site import Site

RIGHTLY_SCALED = (1, 1, 0)
"""The release from which on LoRA's alpha / r is applied; older ones trained with a scale of 1."""

AFTER_THE_NORM = frozenset({"bert", "roberta", "xlm-roberta", "electra", "distilbert", "bert-generation", "xmod", "deberta", "deberta-v2"})
"""Model types whose residual is what the sub-layer's first projection is given; elsewhere a norm stands between."""

GLUED = {
    "attention_adapters": ("attention", "output"),
    "output_adapters": ("", "down"),
    "cross_attention_adapters": ("cross_attention", "output"),
}
"""Modules that the library adds to a layer -> the sub-layer they act behind, and the last word of its last projection's role."""


@dataclass(frozen=True)
class Content:
    """What an architecture reads from.

    Attributes:
        fields: of its config.
        tensors: of the file.
        sites: of the backbone.
        name: of the adapter, as it stands in the tensors' names.
        model_type: of the backbone it was trained on.
        version: of the library.
    """

    fields: Fields
    tensors: Tensors
    sites: Index
    name: str
    model_type: str
    version: tuple[int, ...]

    def modules(self, container: str) -> dict[str, dict[str, Tensor]]:
        """Path -> name -> tensor, of what stands in a container of the library: ``<path>.<container>.<name>.<rest>``."""
        return self.tensors.take(rf"((?:.+(?=\.{container}\.))?)\.?{container}\.{re.escape(self.name)}\.(.+)")

    def site(self, path: str, leaf: str | None = None) -> Site:
        """The site of a module, or of one role of a fused one.

        Raises:
            CheckpointError: this backbone has none there.
        """
        key = path if leaf is None else f"{path}:{leaf}"
        if key not in self.sites:
            raise CheckpointError(
                f"`{self.tensors.file}` sits at `{key}`, and this {type(self.sites.backbone).__name__} has no such module. "
                "Load the backbone it was trained on."
            )
        return self.sites[key]

    def behind(self, path: str) -> Site:
        """The last projection of the sub-layer that a bottleneck acts behind.

        Raises:
            CheckpointError: this backbone has none there.
        """
        owner, _, last = path.rpartition(".")
        layer, (sublayer, leaf) = (owner, GLUED[last]) if last in GLUED else (path, ("", ""))
        leaves = (leaf,) if leaf else ("output", "down")
        found = [site for site in below(self.sites, layer, leaves) if not sublayer or (site.role or "").split(".")[-2] == sublayer]
        if len(found) != 1:
            raise CheckpointError(
                f"`{self.tensors.file}` has an adapter at `{path}`, where this {type(self.sites.backbone).__name__} has {len(found)} "
                "sub-layers. Load the backbone it was trained on."
            )
        return found[0]

    def stream(self, behind: Site) -> Site:
        """Where the residual stream stands behind a sub-layer: at the norm that follows, or, where none does, at the end of the layer.

        Raises:
            Unsupported: the sub-layer is not the layer's last, and no norm follows.
        """
        layer = next((site for site in self.sites if site.leaf == "layer" and f"{behind.path}.".startswith(f"{site.path}.")), None)
        inside = [] if layer is None else list(below(self.sites, layer.path, ("norm", "output", "down")))
        after = inside[inside.index(behind) + 1 :] if behind in inside else []
        if self.model_type in AFTER_THE_NORM and after and after[0].leaf == "norm":
            return after[0]
        if layer is None or self.model_type in AFTER_THE_NORM or any(site.leaf != "norm" for site in after):
            raise Unsupported(
                f"`{self.tensors.file}` has a bottleneck that reads the residual stream behind `{behind.path}`, where deltatune has no "
                f"place for one in this {type(self.sites.backbone).__name__}. Train it anew here."
            )
        return layer


architectures: Registry[Callable[[Content], list[Part]]] = Registry("architecture of adapters", "adapters_architectures")
"""What reads the parts of a config of that ``architecture``; bottlenecks have none, and are ``bottleneck`` here."""
