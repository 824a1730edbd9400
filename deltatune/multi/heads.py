"""Task heads of other sizes: a delta brings its own, and the rows of a batch come back with the labels of their tasks.

The backbone's head has one number of labels. A delta that was trained with another one joins without it
(``dt.load(..., head=False)``) and is given its head by ``dt.bank(backbone).head(name, folder)``; it acts in routes. The
logits of a routed batch are as wide as the widest head in it, and rows with fewer labels end in ``-inf``, which no softmax
sees and no argmax takes; ``split`` cuts it off. A loss over routed rows is the caller's: the backbone's own knows one
number of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.entries import heads_of
from deltatune.injection.slot import Member, close_slot, slot_of
from deltatune.methods.kinds import SelectionPatch
from deltatune.methods.lanes import Lane
from deltatune.multi.act import RouteAct
from deltatune.multi.forms.affine import ABSENT
from deltatune.multi.reading import Source
from deltatune.multi.tables import OWN
from deltatune.structure.site import Site, modules_of

if TYPE_CHECKING:
    from deltatune.multi.bank import Bank


def split(logits: Tensor) -> list[Tensor]:
    """The logits of each row, with the labels of its own task.

    Args:
        logits: of a routed batch, (rows, widest) or (rows, tokens, widest).

    Example:
        >>> import torch
        >>> [row.shape[-1] for row in split(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, -torch.inf]]))]
        [3, 2]
    """
    widths = ((logits != ABSENT).flatten(1, -2) if logits.ndim > 2 else logits != ABSENT).reshape(len(logits), -1, logits.shape[-1])
    return [row[..., : int(own.any(0).sum())] for row, own in zip(logits, widths, strict=True)]


def linears_of(bank: Bank, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Path below the backbone's head -> linear map there, for the maps that these tensors are for.

    Raises:
        Unsupported: the backbone has no task head, or several.
        InvalidValue: the tensors are not those of a head like it.
    """
    index = bank.ledger.index(bank.backbone)
    heads = heads_of(index)
    if len(heads) != 1:
        raise Unsupported(
            f"A head of its own was given for a delta on a {type(bank.backbone).__name__}, which has {len(heads)} task heads (role "
            "`readout`), not one. Load a backbone for classification."
        )
    modules = {path: module for path, module in modules_of(heads[0].module).items() if Site("", module).is_linear}
    names = {f"{path}.{name}" if path else name for path, module in modules.items() for name in module._parameters}
    if set(tensors) != names:
        raise InvalidValue(
            f"A head of its own was given as {', '.join(f'`{name}`' for name in sorted(tensors))}. Give the tensors "
            f"{', '.join(f'`{name}`' for name in sorted(names))}, with as many labels as the task has."
        )
    for path, module in modules.items():
        weight, bias = (tensors.get(f"{path}.{name}" if path else name) for name in ("weight", "bias"))
        _check_shapes(Site(path, module), weight, bias)
    return modules


def _check_shapes(site: Site, weight: Tensor | None, bias: Tensor | None) -> None:
    """The map reads what the backbone gives it, whatever the number of its outputs.

    Raises:
        InvalidValue: it does not.
    """
    shape = () if weight is None else tuple(weight.shape)
    axis = 0 if site.transposed else 1
    if len(shape) != 2 or shape[axis] != site.in_features or (bias is not None and tuple(bias.shape) != (shape[1 - axis],)):
        raise InvalidValue(
            f"A head of its own was given with a weight {shape} and a bias {None if bias is None else tuple(bias.shape)}, on a backbone "
            f"whose head reads {site.in_features} numbers. Give a weight (labels, {site.in_features}) and a bias (labels,)."
        )


def place_head(bank: Bank, name: str, tensors: Mapping[str, Tensor]) -> list[tuple[RouteAct, nn.Module]]:
    """Enter a head's tensors as lanes; returns the acts, with their modules."""
    placed = []
    for path, module in linears_of(bank, tensors).items():
        site = Site(path, module)
        weight = tensors[f"{path}.weight" if path else "weight"]
        bias = tensors.get(f"{path}.bias" if path else "bias")
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        act = bank.act_of(module)
        if name not in act.members:
            act.add(module, Member(name, site, SelectionPatch("weight", by_value=True)))
        W = weight if site.transposed else weight.T
        act.tables.enter((name, OWN), "module", Source(Lane("affine", {"W": W.detach(), "b": bias.detach()}), site), module)
        act.tables.own.add(name)
        placed.append((act, module))
    return placed


def remove_head(name: str, placed: list[tuple[RouteAct, nn.Module]]) -> None:
    """Take the lanes of a head back; an act without deltas goes."""
    for act, module in placed:
        act.remove(module, name)
        slot = slot_of(module)
        if slot is not None and not act.members and slot.acts.get(type(act)) is act:
            slot.acts = {kind: other for kind, other in slot.acts.items() if other is not act}  # a forward may be walking them
            act.leave(None)
            if not slot.acts:
                close_slot(module)
