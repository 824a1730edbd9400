"""Merged checkpoints: a delta folded into its backbone's weights, written as the backbone's own library writes it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.checkpoint.folder import place_of, replacing
from deltatune.errors import Unsupported
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.ledger import Ledger, ledger_of
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import Slot
from deltatune.structure.anatomy import modules_of
from deltatune.structure.site import is_packed


def write_merged(delta: Delta | Composition, folder: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False) -> Path:
    """Write the backbone with the delta folded in, so that it loads without this library, and nothing of it acts twice.

    Every changed weight is checked numerically while it is merged. The attached model is as it was when this returns.

    Args:
        delta: an acting delta of a kind that merges, or a sequential composition of such.
        folder: where to; ``from_pretrained`` of the backbone's class reads it.
        tokenizer: saved beside the weights.
        overwrite: replace what is in the folder.

    Returns:
        The folder.

    Raises:
        Unsupported: the delta's kind does not merge, another delta acts as well, the backbone is quantised, or has no
            ``save_pretrained``.
        OutputError: the folder is not empty, or cannot be written.
    """
    backbone: Any = delta.backbone
    if not hasattr(backbone, "save_pretrained"):
        raise Unsupported(
            f"A merged checkpoint of {type(backbone).__name__} cannot be written: it has no `save_pretrained`. Merge it for good with "
            "dt.merge(delta, keep=True), and save its state_dict yourself."
        )
    check_unpacked(backbone)
    with replacing(folder, overwrite=overwrite) as fresh:
        with folded(delta) as merged:
            whole: Any = merged
            whole.save_pretrained(fresh, state_dict=plain_state(merged))
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return place_of(folder)


def check_unpacked(backbone: nn.Module) -> None:
    """No weight of it is quantised.

    Raises:
        Unsupported: one is: a change added to its codes, or rounded to them, would be lost.
    """
    for path, module in modules_of(backbone).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and is_packed(parameter):
                raise Unsupported(
                    f"`{path}.{name}` is quantised ({type(parameter.data).__name__}, {parameter.dtype}), and quantising the merged weight "
                    "again would lose the delta. Dequantise the backbone first: `deltatune convert --dequantize`."
                )


@contextmanager
def folded(delta: Delta | Composition) -> Iterator[nn.Module]:
    """The backbone with the delta in its weights, for a moment; for a composition it is a copy of the backbone.

    Raises:
        Unsupported: it cannot be merged, or another delta acts as well.
    """
    ledger = delta.ledger
    _check_alone(ledger, delta)
    if isinstance(delta, Delta):
        before = delta.merged
        if not before:
            merge(delta)
        try:
            yield delta.backbone
        finally:
            if not before:
                unmerge(delta)
        return
    if delta.how != "sequential":
        raise Unsupported(
            f"The composition `{delta.name}` cannot be merged: how={delta.how!r} is no sequence of changes to the weights. "
            "Combine its members with dt.combine, or keep it attached."
        )
    twin = copy.deepcopy(delta.backbone)
    own = ledger_of(twin)
    assert own is not None
    composition = own.compositions[delta.name]
    members = composition.deltas
    composition.dissolve()
    _merge_all(members)
    yield twin


def _merge_all(members: list[Delta]) -> None:
    """Merge deltas in an order in which they merge: what changes a weight acts inside what edits outputs, whichever came first."""
    waiting, refused = list(members), None
    while waiting:
        for member in waiting:
            try:
                merge(member)
            except Unsupported as cause:
                refused = refused or cause
                continue
            waiting.remove(member)
            refused = None
            break
        else:
            assert refused is not None
            raise refused


def _check_alone(ledger: Ledger, delta: Delta | Composition) -> None:
    own = delta.members if isinstance(delta, Composition) else (delta.name,)
    others = [name for name in ledger.acting_deltas if name not in own]
    if others:
        raise Unsupported(f"`{others[0]}` acts beside `{delta.name}`. Let it rest first (`disable`), or compose the two.")
    if not delta.enabled:
        raise Unsupported(f"`{delta.name}` is disabled, so there is nothing to merge. Enable it first.")


def plain_state(backbone: nn.Module) -> Mapping[str, Tensor]:
    """``backbone.state_dict()`` as it stands now, without what deltas put into the tree."""
    ours = tuple(f"{path}." for path, module in backbone.named_modules(remove_duplicate=False) if isinstance(module, Slot | Ledger))
    return {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(ours)}
