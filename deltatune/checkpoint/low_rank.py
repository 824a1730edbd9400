"""Any delta that is a change of weights, as a LoRA: each matrix's change by its largest singular values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.checkpoint.folder import check_free
from deltatune.checkpoint.format import save
from deltatune.checkpoint.loading import Allowed, Plan, attach_plan, index_of
from deltatune.checkpoint.merged import check_unpacked, folded, plain_state
from deltatune.checkpoint.schemes import Factors, truncated
from deltatune.checkpoint.targets import Given, targets
from deltatune.checkpoint.tensors import named
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry
from deltatune.injection.state import backbone_state
from deltatune.methods import LoRA
from deltatune.methods.kinds import OutputPatch, SelectionPatch
from deltatune.methods.reparameterization.matrix_view import MatrixView
from deltatune.structure.site import Site

RANK = 8


@dataclass(frozen=True)
class Approximation:
    """A LoRA that stands for another delta, and how well it does.

    Attributes:
        delta: the LoRA, attached and acting; the other one rests.
        errors: key of each site -> ||D - B A|| / ||D|| of its change D, in the Frobenius norm.
        left_out: names of changed parameters that a LoRA cannot change, such as biases.
        error: sqrt(sum ||D - B A||^2 / sum ||D||^2) over all changes, those that are left out included.
    """

    delta: Delta
    errors: Mapping[str, float]
    left_out: tuple[str, ...]
    error: float


def approximate(delta: Delta | Composition, rank: int = RANK, *, name: str | None = None, allow_left_out: bool = False) -> Approximation:
    """A LoRA of this rank that is nearest to the delta: B A = U_r S_r V_r^T of the change D = W' - W of every matrix.

    It is exact where the changes have no higher rank. Task heads go along as they are. The delta rests afterwards, and
    the LoRA acts.

    Args:
        delta: an acting delta that merges, or a sequential composition of such.
        rank: r.
        name: of the LoRA; the delta's, with ``-lora`` behind it, if left out.
        allow_left_out: leave changes of vectors out, which have no rank; else they are an error.

    Raises:
        Unsupported: the delta cannot be merged, changes no matrix, or vectors as well.
        InvalidValue: the rank is no positive number.
    """
    if rank < 1:
        raise InvalidValue(f"A LoRA of rank {rank} was asked for. Give a rank of at least 1.")
    check_unpacked(delta.backbone)
    changes = _changes(delta)
    sites = _matrices(delta, changes)
    left_out = tuple(sorted(changes.keys() - sites.keys()))
    if not sites:
        raise Unsupported(f"`{delta.name}` changes no matrix, so no LoRA comes near it: it changes {named(left_out) or 'nothing'}.")
    if left_out and not allow_left_out:
        raise Unsupported(
            f"`{delta.name}` also changes {named(left_out)}, which have no rank, so a LoRA would lose that. Convert it to merged, or "
            "pass allow_left_out=True (--allow-left-out) to do without."
        )
    placed = _placed(delta, name or f"{delta.name}-lora", rank, {site.key: (site, changes[path]) for path, site in sites.items()})
    errors, missed, whole = {}, 0.0, 0.0
    for path in left_out:
        missed += float(changes[path].square().sum())
        whole += float(changes[path].square().sum())
    reached = {entry.site.key: _product(entry) for entry in placed.entries if not isinstance(entry.patch, SelectionPatch)}
    for path, site in sites.items():
        change, found = _as_matrix(site, changes[path]), reached[site.key]
        off, size = float((change - found).square().sum()), float(change.square().sum())
        errors[site.key] = (off / size) ** 0.5
        missed, whole = missed + off, whole + size
    return Approximation(placed, errors, left_out, (missed / whole) ** 0.5)


def _changes(delta: Delta | Composition) -> dict[str, Tensor]:
    """Name of each changed parameter of the backbone, heads left aside -> its change, in double precision."""
    heads = tuple(f"{entry.site.path}." for entry in _heads(delta))
    with folded(delta) as merged, torch.no_grad():
        before, after = backbone_state(merged), plain_state(merged)
        own = [name for name, _ in merged.named_parameters() if name in before and not name.startswith(heads)]  # tied ones once
        unlike = [name for name in own if not torch.equal(before[name], after[name])]
        return {name: after[name].double() - before[name].double() for name in unlike}


def _heads(delta: Delta | Composition) -> list[Entry]:
    members = delta.deltas if isinstance(delta, Composition) else [delta]
    return [entry for member in members for entry in member.entries if entry.head and isinstance(entry.patch, SelectionPatch)]


def _matrices(delta: Delta | Composition, changes: Mapping[str, Tensor]) -> dict[str, Site]:
    """Name of a changed parameter -> the site of the whole matrix that it is; a tied one stands under one name."""
    names = {id(parameter): name for name, parameter in delta.backbone.named_parameters() if name in changes}
    found: dict[str, Site] = {}
    for site in index_of(delta.backbone):
        if site.rows is None and site.has_matrix and (name := names.get(id(site.weight))) is not None:
            found.setdefault(name, site)
    return found


def _as_matrix(site: Site, change: Tensor) -> Tensor:
    """The change as (*stack, out, in)."""
    return MatrixView.of(site).read(change)


def _placed(delta: Delta | Composition, name: str, rank: int, changes: Mapping[str, tuple[Site, Tensor]]) -> Delta:
    """The LoRA, filled; the delta it stands for rests."""
    heads = {f"{entry.key}": entry.choice.value(entry.delta, entry.parameter).detach().clone() for entry in _heads(delta)}
    head_sites = tuple(dict.fromkeys(entry.site for entry in _heads(delta)))

    def tensors(placed: Delta, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        state = dict(heads)
        for entry in placed.entries:
            if not isinstance(entry.patch, SelectionPatch):
                B, A = _factors(entry, changes[entry.site.key][1], rank)
                state |= {f"{entry.key}.lora_A": A.float(), f"{entry.key}.lora_B": B.float()}
        return state

    plan = Plan(
        title=name,
        name=name,
        method=LoRA(rank=rank, alpha=rank),
        sites=tuple(site for site, _ in changes.values()),
        heads=head_sites,
        tensors={key: change for key, (_, change) in changes.items()},
        named=tensors,
    )
    delta.disable()
    try:
        return attach_plan(delta.backbone, plan, Allowed(idle=True))
    except BaseException:
        delta.enable()
        raise


def _is_flipped(entry: Entry) -> bool:
    """An embedding's LoRA is of its transpose, (width, rows)."""
    return isinstance(entry.site.module, nn.Embedding) and isinstance(entry.patch, OutputPatch)


def _factors(entry: Entry, change: Tensor, rank: int) -> Factors:
    matrix = _as_matrix(entry.site, change)
    return truncated(matrix.mT if _is_flipped(entry) else matrix, rank)


def _product(entry: Entry) -> Tensor:
    """B A of a placed LoRA of scale 1, (*stack, out, in)."""
    state = entry.patch.state_dict()
    product: Tensor = state["lora_B"].double() @ state["lora_A"].double()
    return product.mT if _is_flipped(entry) else product


@targets.register("lora")
def lora(given: Given, out: Path) -> Mapping[str, Any]:
    """A LoRA in our own format, by singular values."""
    check_free(out, given.overwrite)
    made = approximate(
        given.delta, RANK if given.rank is None else given.rank, name=given.delta.name + "-lora", allow_left_out=given.allow_left_out
    )
    told = {**vars(given.about), "where": None, "layers": None, "score": None, "metrics": None}
    save(made.delta, out, overwrite=given.overwrite, backbone_id=given.backbone_id, **told)
    return {"relative_error": made.error, "errors": dict(made.errors), "left_out": list(made.left_out)}
