"""Prefixes of the adapters library: up to three groups of attentions, each from numbers or from an MLP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltatune.checkpoint.adapters.content import Content, architectures
from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_shapes import (
    activation,
    attentions,
    prefix_part,
    through_mlp,
)
from deltatune.errors import CheckpointError
from deltatune.methods.addition.bottleneck import Activation
from deltatune.structure.site import Site

PREFIXES = {
    "encoder_prefix": ("encoder.attention",),
    "self_prefix": ("attention", "decoder.attention"),
    "cross_prefix": ("cross_attention", "decoder.cross_attention"),
}
"""Groups of prefixes -> roles of their attentions."""


@architectures.register("prefix_tuning")
def read_prefix(content: Content) -> list[Part]:
    """Prefixes of up to three groups of attentions, each as they are or as an MLP makes them."""
    fields = content.fields
    left_out = set(fields.take("leave_out", []))
    fields.refuse("use_gating")
    fields.take("shared_gating", True)
    for field in ("encoder_prefix", "cross_prefix"):
        fields.take(field, True)
    fields.only_trains("dropout")
    length, flat, mid_dim = fields.take("prefix_length", 30), fields.take("flat", False), fields.take("bottleneck_size", 512)
    f = activation(fields.take("non_linearity", "tanh"), fields.file)
    _drop_copies(content)
    found = content.modules("prefix_tunings")
    content.tensors.need(found, "prefix")
    [groups] = found.values() if len(found) == 1 else [{}]
    made: list[tuple[Site, Tensor, Tensor]] = []
    for label, roles in PREFIXES.items():
        group = {name.removeprefix(f"{label}."): groups.pop(name) for name in list(groups) if name.startswith(f"{label}")}
        if group:
            made += _prefixes(content, group, _chosen(content, roles, left_out), length, flat, f)
    content.tensors.pick(groups, "prefix_tunings", {})
    return [prefix_part("prefix", made, None if flat else mid_dim, content.tensors.file)]


def _drop_copies(content: Content) -> None:
    """The library stores the whole pool once more below every attention."""
    copies = [name for name in content.tensors.left if ".prefix_tuning.pool.prefix_tunings." in name]
    for name in copies:
        del content.tensors.left[name]


def _chosen(content: Content, roles: tuple[str, ...], left_out: set[int]) -> list[Site]:
    """Attentions of these roles, without the layers left out; a decoder's are counted behind the encoder's."""
    depth = 1 + max((site.layer or 0 for site in content.sites if (site.role or "").startswith("encoder.")), default=-1)
    return [
        site
        for site in attentions(content.sites, *roles)
        if (site.layer or 0) + (depth if (site.role or "").startswith("decoder.") else 0) not in left_out
    ]


def _prefixes(
    content: Content, group: Mapping[str, Tensor], sites: list[Site], length: int, flat: bool, f: Activation
) -> list[tuple[Site, Tensor, Tensor]]:
    if flat:
        [numbers] = content.tensors.pick(group, "prefix_tunings", {"control_trans": 1})
        made = numbers.view(length, -1) if numbers.numel() % length == 0 else numbers[None]
    else:
        names = ("wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias")
        made = through_mlp(content.tensors.pick(group, "prefix_tunings", {name: 2 - name.endswith("bias") for name in names}), f)
    if not sites or made.shape[0] != length or made.shape[1] % (2 * len(sites)):
        raise CheckpointError(
            f"`{content.tensors.file}` makes prefixes of the shape {tuple(made.shape)}, not divisible among {len(sites)} attentions "
            f"of this {type(content.sites.backbone).__name__}. Load the backbone it was trained on."
        )
    layers = torch.unbind(made.reshape(length, 2 * len(sites), -1), 1)
    return [(site, layers[2 * k], layers[2 * k + 1]) for k, site in enumerate(sites)]
