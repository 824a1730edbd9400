"""LoRA, and (IA)^3, which the adapters library keeps as a LoRA that scales."""

from __future__ import annotations

from torch import Tensor

from deltatune.checkpoint.adapters.content import RIGHTLY_SCALED, Content, architectures
from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError, Unsupported
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.structure.site import Site


@architectures.register("lora")
def read_lora(content: Content) -> list[Part]:
    """LoRA, and (IA)^3, which the library keeps as a LoRA that scales."""
    fields = content.fields
    fields.take("leave_out", [])
    fields.refuse("use_gating")
    fields.refuse("use_dora", why="its DoRA rescales the bias, too, and leaves alpha / r out of the norm")
    for field in ("vera_d", "vera_b"):
        fields.refuse(field, why="its VeRA trains dense matrices")
    found = content.modules("loras")
    content.tensors.need(found, "LoRA")
    letters = fields.take("attn_matrices", ["q", "v"])
    matrices = [name for letter, name in (("q", "query"), ("k", "key"), ("v", "value")) if letter in letters]
    read = {"add": _read_added, "scale": _read_scaled}.get(fields.take("composition_mode", "add"))
    if read is None:
        raise Unsupported(f"`{fields.file}` has a composition_mode that is neither add nor scale. Train it anew here.")
    return [read(content, found, matrices)]


def _read_added(content: Content, found: dict[str, dict[str, Tensor]], matrices: list[str]) -> Part:
    fields = content.fields
    r = fields.take("r", 8)
    alpha = float(fields.take("alpha", 8, int, float))
    if content.version < RIGHTLY_SCALED:
        alpha = float(r)
    tensors: dict[tuple[str, str], Tensor] = {}
    for path, group in found.items():
        A, B = content.tensors.pick(group, path, {"lora_A": 2, "lora_B": 2})
        for site, rows_A, rows_B in _shared_out(content, path, matrices, A, B):
            tensors[site.key, "lora_A"], tensors[site.key, "lora_B"] = rows_A, rows_B
    return Part("lora", LoRA(r, alpha, fields.take("dropout", 0.0)), tensors)


def _read_scaled(content: Content, found: dict[str, dict[str, Tensor]], matrices: list[str]) -> Part:
    fields = content.fields
    fields.refuse("dropout", 0.0)
    fields.refuse("r", 1)
    fields.refuse("alpha", 1)
    tensors: dict[tuple[str, str], Tensor] = {}
    leaves: set[str] = set()
    for path, group in found.items():
        [B] = content.tensors.pick(group, path, {"lora_B": 2})
        for site, _, rows in _shared_out(content, path, matrices, B, B):
            tensors[site.key, "l"] = rows.reshape(-1)
            leaves.add(site.leaf)
    return Part("ia3", IA3(inputs=tuple(leaf for leaf in IA3.inputs if leaf not in leaves)), tensors)


def _shared_out(content: Content, path: str, matrices: list[str], A: Tensor, B: Tensor) -> list[tuple[Site, Tensor, Tensor]]:
    """The site of a module; of a fused projection the site of each of its matrices, with its rows of A and B."""
    if path in content.sites and not any(f"{path}:{leaf}" in content.sites for leaf in matrices):
        return [(content.site(path), A, B)]
    sites = [content.site(path, leaf) for leaf in matrices]
    if not sites or A.shape[0] % len(sites) or B.shape[0] % len(sites):
        raise CheckpointError(f"`{content.tensors.file}`: `{path}` does not divide over {named(matrices)}. Copy the folder again.")
    return list(zip(sites, A.chunk(len(sites)), B.chunk(len(sites)), strict=True))
