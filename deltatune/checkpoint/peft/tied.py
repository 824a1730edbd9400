"""LoRA on a weight that several modules share: one change here, and in PEFT one at each of them, with the same values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from deltatune.checkpoint.peft.tuner import Content, Output, Placed
from deltatune.checkpoint.tensors import named
from deltatune.errors import Unsupported

A, B = "lora_A.weight", "lora_B.weight"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"


def spread_tied(place: Placed, output: Output) -> Iterator[Placed]:
    """A place at every module that has the weight; the place itself where that is one.

    As a linear map the weight (vocabulary, hidden) changes by s B A, and as a table, whose factors are those of its
    transpose, by s (B' A')^T: B' = A^T and A' = B^T.
    """
    if not place.site.tied:
        yield place
        return
    for path in output.modules.tied_paths(place.site):
        site = output.modules.site(path)
        theirs = dict(place.theirs)
        if isinstance(site.module, nn.Embedding):
            theirs |= {TABLE_A: theirs.pop(B).T.contiguous(), TABLE_B: theirs.pop(A).T.contiguous()}
        yield replace(place, path=path, site=site, theirs=theirs)


def join_tied(stored: Iterable[Placed], content: Content) -> Iterator[Placed]:
    """The places as they are, but those of one tied weight as one, of the form a linear map has.

    Raises:
        Unsupported: they are not one change of the weight: a module that reads it has none, or another one.
    """
    groups: dict[int, list[Placed]] = {}
    for place in stored:
        if place.site.tied and place.site.parameter is None:
            groups.setdefault(id(place.site.weight), []).append(_as_linear(place))
        else:
            yield place
    for places in groups.values():
        yield _one(places, content)


def _one(places: list[Placed], content: Content) -> Placed:
    reading = [path for path in content.modules.tied_paths(places[0].site) if content.modules.site(path).reached]
    by_path = {place.path: place for place in places}
    bare = [path for path in reading if path not in by_path]
    if bare:
        raise Unsupported(
            f"`{content.stored.file}` changes {named(by_path)}, and not {named(bare)}, which has the same weight: a tied weight has one "
            "value here. Train it in PEFT with ensure_weight_tying=True, or untie the backbone's weights."
        )
    first = by_path[reading[0]]
    for path in reading[1:]:
        other = by_path[path]
        same = all(torch.equal(first.theirs[name], other.theirs[name]) for name in (A, B))
        if not same or first.method != other.method:
            raise Unsupported(
                f"`{content.stored.file}` changes `{first.path}` and `{path}`, which have one weight, in two ways: a tied weight has one "
                "value here. Train it in PEFT with ensure_weight_tying=True, or untie the backbone's weights."
            )
    return first


def _as_linear(place: Placed) -> Placed:
    theirs: dict[str, Tensor] = dict(place.theirs)
    if TABLE_A in theirs and TABLE_B in theirs:
        theirs |= {B: theirs.pop(TABLE_A).T.contiguous(), A: theirs.pop(TABLE_B).T.contiguous()}
    return replace(place, theirs=theirs)
