"""PREFIX_TUNING: virtual keys and values of every layer in one table, of grouped-query models for the key and value heads alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import ROOT, Modules
from deltatune.checkpoint.peft.prompts import SIZES, STORED, read_stored
from deltatune.checkpoint.peft.tuner import Content, Output, Tuner, cannot, tuners
from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods.addition.p_tuning_v2 import PTuningV2
from deltatune.methods.addition.prefix import key_value_shape
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.kinds import PrefixPatch
from deltatune.structure.site import Site


class Prefixes(Tuner):
    """PREFIX_TUNING.

    The table is (T, 2 L heads head_dim): keys and values of layer 0, of layer 1, and so on. Of an encoder-decoder it is that
    of the decoder's self-attentions, and PEFT gives layer l the entry 2 l mod L, because it cuts the doubled table in fours.
    """

    methods = (PrefixTuning, PTuningV2)
    prefix = ROOT
    fields: ClassVar[Mapping[str, Any]] = {**SIZES, "encoder_hidden_size": None, "init_weights": None, "prefix_projection": False}
    targeted = False

    def read(self, content: Content) -> list[Part]:
        """P_k and P_v of each layer, in the final form."""
        width = content.fields.take("encoder_hidden_size", 0) or PrefixTuning.mid_dim
        for key in ("init_weights", "prefix_projection"):
            content.fields.data.pop(key, None)  # of what made the table, which is gone
        table, length = read_stored(content)
        sites, order = attentions(content.modules)
        heads, head_dim = key_value_shape(sites[0])
        expected = length, len(sites) * 2 * heads * head_dim
        if table.shape != expected:
            raise CheckpointError(
                f"`{content.stored.file}` holds a table of {tuple(table.shape)}; {length} virtual tokens in {len(sites)} layers with "
                f"{heads} heads of {head_dim} take {expected}. Load the backbone it was trained on."
            )
        by_layer = table.view(length, len(sites), 2, heads, head_dim).permute(1, 2, 3, 0, 4)  # (L, 2, heads, T, head_dim)
        tensors = {
            (site.key, name): by_layer[entry, k].contiguous()
            for site, entry in zip(sites, order, strict=True)
            for k, name in enumerate(("P_k", "P_v"))
        }
        return [Part("prefix", PrefixTuning(num_virtual_tokens=length, reparameterization=False, mid_dim=width), tensors)]

    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """The table, made for the last time if need be."""
        if len(deltas) > 1:
            raise cannot(deltas[1], "it has one prefix in a folder")
        sites, order = attentions(output.modules)
        pairs = _pairs(deltas[0], sites)
        heads, length, head_dim = pairs[0][0].shape
        entries: dict[int, Tensor] = {}
        for entry, pair in zip(order, pairs, strict=True):
            own = torch.stack(pair).permute(2, 0, 1, 3)  # (T, 2, heads, head_dim)
            if entry in entries and not torch.equal(entries[entry], own):
                raise cannot(deltas[0], "PEFT gives two layers of such an encoder-decoder the same virtual keys, and here they differ")
            entries[entry] = own
        unused = torch.zeros_like(next(iter(entries.values())))
        table = torch.stack([entries.get(entry, unused) for entry in range(len(sites))], 1)
        output.tensors[STORED] = table.reshape(length, -1)
        output.config |= {
            "num_virtual_tokens": length,
            "token_dim": heads * head_dim,
            "num_layers": len(sites),
            "num_attention_heads": heads,
            "encoder_hidden_size": getattr(deltas[0].method, "mid_dim", None),
            "num_transformer_submodules": 2 if any(stack.side for stack in output.modules.sites.stacks) else 1,
        }


def attentions(modules: Modules) -> tuple[list[Site], list[int]]:
    """The self-attentions that PEFT gives prefixes, by layer, and the entry of the table for each.

    Raises:
        Unsupported: there is not one text stack, or one decoder, with one attention a layer.
    """
    stacks = [stack for stack in modules.sites.stacks if stack.side != "encoder"]
    found = [site for stack in stacks for site in stack.attentions if site.leaf == "attention"]
    found.sort(key=lambda site: site.layer or 0)
    if len(stacks) != 1 or [site.layer for site in found] != list(range(stacks[0].layers)):
        raise Unsupported(f"{type(modules.backbone).__name__} has no text stack with one self-attention a layer, as PEFT's prefixes need.")
    count = len(found)
    return found, [2 * layer % count if stacks[0].side else layer for layer in range(count)]


def _pairs(delta: Delta, sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
    """P_k and P_v of each site.

    Raises:
        Unsupported: the delta sits elsewhere, or its prefixes differ in shape.
    """
    own = {entry.site.key: entry.patch for entry in delta.entries if not entry.head}
    if own.keys() != {site.key for site in sites} or not all(isinstance(patch, PrefixPatch) for patch in own.values()):
        raise cannot(delta, "PEFT's prefixes are in every self-attention of one stack, that of the decoder where there are two")
    with torch.no_grad():
        pairs = [patch() for site in sites if isinstance(patch := own[site.key], PrefixPatch)]
    if len({key.shape for key, _ in pairs}) > 1:
        raise cannot(delta, "its prefixes differ in shape from layer to layer")
    return pairs


tuners.register("PREFIX_TUNING")(Prefixes())
