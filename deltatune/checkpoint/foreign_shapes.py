"""Adapters and prefixes of other libraries in our shapes: the same outputs, from tensors laid out as our patches hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.foreign_files import left_over
from deltatune.checkpoint.tensors import named
from deltatune.errors import CheckpointError, Unsupported
from deltatune.injection.interface import has_table
from deltatune.methods.addition.bottleneck import ACTIVATIONS, Activation, reduced
from deltatune.methods.addition.prefix import key_value_shape
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.specification.full import FullFineTuning
from deltatune.structure.index import Index
from deltatune.structure.site import Site

SAME: tuple[Activation, ...] = get_args(Activation)
SPELLINGS: dict[str, Activation] = {"gelu_orig": "gelu", "swish": "silu", **{name: name for name in SAME}}
"""What other libraries call an activation -> what we call it."""


class Tensors:
    """The tensors of a foreign file, taken out one module at a time; nothing may be left over.

    Args:
        tensors: name -> tensor.
        file: where they stand, for errors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        self.left = dict(tensors)
        self.file = file

    def take(self, pattern: str) -> dict[str, dict[str, Tensor]]:
        """Path of a module -> name -> tensor, of the names that match.

        Args:
            pattern: a regular expression of two groups, the path and the name.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key in list(self.left):
            match = re.fullmatch(pattern, key)
            if match is not None:
                found.setdefault(match[1], {})[match[2]] = self.left.pop(key)
        return found

    def need(self, found: Mapping[str, object], what: str) -> None:
        """Something was found.

        Raises:
            CheckpointError: nothing was.
        """
        if not found:
            raise CheckpointError(f"`{self.file}` holds no {what}, which its config promises. It has {named(self.left) or 'nothing'}.")

    def pick(self, group: Mapping[str, Tensor], path: str, shapes: Mapping[str, int]) -> list[Tensor]:
        """The tensors of one module in the order asked for.

        Args:
            group: name -> tensor of the module.
            path: of the module, for errors.
            shapes: name -> number of dimensions.

        Raises:
            CheckpointError: one is missing, misshapen, or has no place.
        """
        absent, foreign = sorted(shapes.keys() - group.keys()), sorted(group.keys() - shapes.keys())
        if absent or foreign:
            said = f"lacks {named(absent)}" if absent else f"has {named(foreign)}, which has no place here"
            raise CheckpointError(f"`{self.file}`: `{path}` {said}. Copy the folder again, or convert it with the library that wrote it.")
        for name, dimensions in shapes.items():
            if group[name].ndim != dimensions:
                shape = tuple(group[name].shape)
                raise CheckpointError(f"`{self.file}`: `{path}.{name}` has the shape {shape}, not {dimensions} dimensions. Copy it again.")
        return [group[name] for name in shapes]

    def end(self, sites: Index) -> None:
        """Nothing may be left.

        Raises:
            CheckpointError: tensors that no rule takes.
        """
        if self.left:
            raise left_over(self.left, self.file, [site.key for site in sites])


def rooted(tensors: Mapping[str, Tensor], sites: Index) -> dict[str, Tensor]:
    """The tensors under paths of this backbone: it may have, or lack, the outermost module of the one they were saved from."""
    paths = [site.path for site in sites if site.path]
    outer = getattr(sites.backbone, "base_model_prefix", "")
    forms = (lambda key: key, lambda key: f"{outer}.{key}", lambda key: key.partition(".")[2])

    def known(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:length]) in starts for length in range(2, len(parts)))

    starts = set(paths)
    scores = [sum(known(form(key)) for key in tensors) for form in forms]
    best = forms[scores.index(max(scores))]
    return {best(key): tensor for key, tensor in tensors.items()}


def activation(name: str, file: Path) -> Activation:
    """An activation in our spelling.

    Raises:
        Unsupported: we lack it.
    """
    ours = SPELLINGS.get(name.lower())
    if ours is None:
        raise Unsupported(f"`{file}` has the activation `{name}`, which our adapters lack; they have {', '.join(sorted(ACTIVATIONS))}.")
    return ours


def reduction_for(width: int, r: int, multiple: int = 1) -> int:
    """The reduction that makes r of a width.

    Raises:
        Unsupported: none does.
    """
    for reduction in range(max(1, width // (r + multiple)), width // max(r, 1) + 2):
        if reduced(width, reduction, multiple) == r:
            return reduction
    raise Unsupported(f"A bottleneck of {r} in a width of {width} is no whole fraction of it. Train the adapter anew here.")


def one_reduction(sizes: Sequence[tuple[int, int]], multiple: int = 1) -> int:
    """The one reduction that fits every (width, r).

    Raises:
        Unsupported: they differ.
    """
    found = {reduction_for(width, r, multiple) for width, r in sizes}
    if len(found) != 1:
        raise Unsupported(f"The adapters reduce their widths by {sorted(found)}; ours reduce all by the same. Train it anew here.")
    return found.pop()


def dense(tensors: Sequence[Tensor], scale: Tensor | float = 1.0) -> dict[str, Tensor]:
    """A plain bottleneck: W (out, in) and b down, then up; ``scale`` of its output goes into the map up.

    >>> sorted(dense([torch.ones(1, 2), torch.ones(1), torch.ones(2, 1), torch.ones(2)]))
    ['bottleneck.D.W', 'bottleneck.D.b', 'bottleneck.U.W', 'bottleneck.U.b']
    """
    down_W, down_b, up_W, up_b = tensors
    scale = torch.as_tensor(scale, dtype=up_W.dtype)
    return {
        "bottleneck.D.W": down_W,
        "bottleneck.D.b": down_b,
        "bottleneck.U.W": up_W * scale.reshape(-1, 1),
        "bottleneck.U.b": up_b * scale.reshape(-1),
    }


def factors(side: str, W_left: Tensor, W_right: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Compacter's map x sum_i A_i (x) (l_i r_i) + b in the factors of ours, which is its transpose: s = r^T, t = l."""
    return {f"bottleneck.{side}.s": W_right.mT, f"bottleneck.{side}.t": W_left, f"bottleneck.{side}.b": b}


def products(side: str, rule: Tensor, W_left: Tensor, W_right: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The same with a rule of its own: A_i^T and B_i = (l_i r_i)^T."""
    return {f"bottleneck.{side}.A": rule.mT, f"bottleneck.{side}.B": (W_left @ W_right).mT, f"bottleneck.{side}.b": b}


def through_mlp(tensors: Sequence[Tensor], f: Activation = "tanh") -> Tensor:
    """The prefix that a reparameterising MLP makes of its embedding: (tokens, numbers of all its layers)."""
    wte, W_1, b_1, W_2, b_2 = tensors
    return F.linear(ACTIVATIONS[f](F.linear(wte, W_1, b_1)), W_2, b_2)


def prefix_part(label: str, made: Sequence[tuple[Site, Tensor, Tensor]], mid_dim: int | None, file: Path) -> Part:
    """Prefix tuning with these keys and values.

    Args:
        label: of the part.
        made: attention, keys and values, each (tokens, key_value_heads * head_dim).
        mid_dim: width of the MLP that made them; None where they were trained as they are.
        file: where they stand, for errors.

    Raises:
        CheckpointError: they do not fit the attention's heads.
        Unsupported: positions are relative.
    """
    if any(has_table(site.module) for site, _, _ in made):
        raise Unsupported(
            f"`{file}` is a prefix for a backbone of relative positions, where other libraries place the text in their own ways, which "
            "changed from release to release. Train it anew here: prefix-tuning."
        )
    tensors, lengths = {}, set()
    for site, keys, values in made:
        heads, head_dim = key_value_shape(site)
        if keys.shape[-1] != heads * head_dim:
            raise CheckpointError(
                f"`{file}` holds prefixes of {keys.shape[-1]} numbers for `{site.path}`, which has {heads} heads of {head_dim}. "
                "Load the backbone it was trained on."
            )
        lengths.add(keys.shape[0])
        for name, tensor in (("P_k", keys), ("P_v", values)):
            tensors[site.key, name] = tensor.reshape(-1, heads, head_dim).transpose(0, 1).contiguous()
    [length] = lengths
    method = PrefixTuning(length, reparameterization=mid_dim is not None, mid_dim=mid_dim or PrefixTuning.mid_dim, placed=False)
    return Part(label, method, tensors, exported=True)


def attentions(sites: Index, *roles: str) -> list[Site]:
    """Attentions of these roles, in the order of the backbone."""
    return [site for site in sites if site.role in roles]


def below(sites: Index, path: str, leaves: Sequence[str]) -> Iterator[Site]:
    """Sites inside a module, of these last words of a role."""
    return (site for site in sites if site.path.startswith(f"{path}.") and site.leaf in leaves)


def unfrozen(tensors: Tensors, sites: Index) -> tuple[list[Part], dict[tuple[str, str], Tensor]]:
    """Parameters of the backbone that a file holds beside the delta: a part of those within the body, and the task heads.

    What equals the backbone's own is no change of it and left out.
    """
    heads: dict[tuple[str, str], Tensor] = {}
    whole: dict[tuple[str, str], Tensor] = {}
    readouts = [site.path for site in sites if site.leaf == "readout" and site.parameter is None]
    for key in sorted(tensors.left):
        path, _, name = key.rpartition(".")
        own = sites[path].module._parameters.get(name) if path in sites else None
        if own is None:
            continue
        tensor = tensors.left.pop(key)
        head = next((head for head in readouts if f"{path}.".startswith(f"{head}.")), None)
        if head is not None:
            heads[head, key[len(head) + 1 :]] = tensor
        elif own.shape != tensor.shape or not torch.equal(own.detach().cpu().to(tensor.dtype), tensor):
            whole[path, name] = tensor
    return [Part("unfrozen", FullFineTuning(), whole)] if whole else [], heads
