"""How a read record becomes an attached delta: everything is checked first, and what does not fit after all is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune.checkpoint.bounded import Bounded
from deltatune.checkpoint.fingerprint import differences, fingerprint
from deltatune.checkpoint.record import MEMBERS, TENSORS, Record
from deltatune.checkpoint.tensors import named, not_finite, read_tensors
from deltatune.errors import CheckpointError, ForeignBackbone, InvalidValue, nearest
from deltatune.injection.attach import detach, place
from deltatune.injection.compose import Composition, compose
from deltatune.injection.delta import Delta
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import check_free, close_ledger, ledger_of
from deltatune.methods.kinds import Exported, Method, Reforming, SelectionPatch
from deltatune.structure.anatomy import modules_of
from deltatune.structure.index import Index, index
from deltatune.structure.site import Site

GROWTH, FLOOR = 64, 64 * 2**20
"""What building may take: so many times the backbone and the file (training-time forms are large), and so many bytes more."""

MISBUILT = (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What PyTorch raises where a field or a tensor makes no sense."""


@dataclass(frozen=True)
class Allowed:
    """What a load takes, with a head and though it does not fit; see ``load``."""

    head: bool = True
    foreign: bool = False
    vocabulary: bool = False
    missing: bool = False
    unexpected: bool = False
    misshapen: bool = False
    nonfinite: bool = False
    unknown: bool = False
    edited: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Plan:
    """A checked delta, ready to be placed.

    Attributes:
        title: what it is called in the file.
        name: what it will be called here.
        method: its recipe.
        sites: where it sits.
        heads: the task heads that belong to it.
        tensors: everything it is made of, under its names in delta files.
        differences: keys of the selections that are stored as differences.
        exported: whether its training-time parameters were dropped.
        named: the placed delta -> the tensors under its names, where they are known by the placed patches only.
    """

    title: str
    name: str
    method: Method
    sites: tuple[Site, ...]
    heads: tuple[Site, ...]
    tensors: Mapping[str, Tensor]
    differences: frozenset[str] = frozenset()
    exported: bool | None = None
    named: Callable[[Delta, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None


def load_delta(backbone: nn.Module, folder: Path, record: Record, name: str, allowed: Allowed) -> Delta:
    """Check one delta's files against the backbone, and attach it."""
    check_free(name, ledger_of(backbone))
    sites = index_of(backbone)
    _check_origin(backbone, sites, record, allowed)
    return attach_plan(backbone, _plan(sites, folder, record, name, allowed), allowed)


def load_composition(backbone: nn.Module, folder: Path, record: Record, name: str, allowed: Allowed) -> Composition:
    """Check all members and the mixers, attach the members, and compose them.

    A member keeps its name; where that is taken it is called after the composition, too.
    """
    check_free(name, ledger_of(backbone))
    sites = index_of(backbone)
    _check_origin(backbone, sites, record, allowed)
    taken = names_on(backbone) | {name}
    plans = []
    for member in record.member_records:
        if not allowed.head and set(member.sites) <= set(member.heads):
            continue  # it is a head and nothing else, as of a fusion
        called = member.name if member.name not in taken else f"{name}-{member.name}"
        check_free(called, ledger_of(backbone))
        plans.append(_plan(sites, folder / MEMBERS / member.name, member, called, allowed))
        taken.add(called)
    mixers = {} if record.stored is None else _tensors(folder, record, allowed)
    placed: list[Delta] = []
    try:
        for plan in plans:
            placed.append(attach_plan(backbone, plan, allowed))
        weights = _weights(record, plans) if record.how == "weighted" else None
        composition = compose(backbone, placed, how=record.how or "sequential", weights=weights, name=name)
        try:
            composition.mixing.load_state_dict(mixers)
        except BaseException:
            composition.dissolve()
            raise
    except BaseException:
        for delta in reversed(placed):
            detach(delta)
        raise
    return composition


def _weights(record: Record, plans: Sequence[Plan]) -> tuple[float, ...]:
    """Those of the members that are loaded."""
    kept = {plan.title for plan in plans}
    return tuple(weight for (member, _), weight in zip(record.members, record.weights, strict=True) if member in kept)


def names_on(backbone: nn.Module) -> set[str]:
    """Every name of a delta or composition on it."""
    ledger = ledger_of(backbone)
    return set() if ledger is None else ledger.deltas.keys() | ledger.compositions.keys()


def index_of(backbone: nn.Module) -> Index:
    """The index of its sites, kept by its ledger if it has one."""
    ledger = ledger_of(backbone)
    return index(backbone) if ledger is None else ledger.renewed_index(backbone)


def _check_origin(backbone: nn.Module, sites: Index, record: Record, allowed: Allowed) -> None:
    if allowed.foreign:
        return
    found = differences(record.origin.fingerprint, fingerprint(backbone, sites), allow_vocabulary=allowed.vocabulary)
    if found:
        trained = record.origin.fingerprint.class_name + (f" `{record.origin.id}`" if record.origin.id else "")
        raise ForeignBackbone(
            f"`{record.name}` was trained on another backbone ({trained}) than this {type(backbone).__name__}: {'; '.join(found)}. "
            "Load the backbone it was trained on, or pass allow_foreign=True."
        )


def _plan(sites: Index, folder: Path, record: Record, name: str, allowed: Allowed) -> Plan:
    """Everything that can be checked without touching the backbone."""
    method = record.build_method(allow_unknown=allowed.unknown)
    tensors = _tensors(folder, record, allowed)
    assert record.stored is not None
    absent = sorted((set(record.stored.differences) | set(record.stored.values)) - tensors.keys())
    if absent and not allowed.missing:
        raise CheckpointError(f"`{folder}` lacks the tensors {named(absent)} that its record names. Copy or save the delta again.")
    plan = Plan(
        title=record.name,
        name=name,
        method=method,
        sites=find(sites, record.name, record.sites),
        heads=find(sites, record.name, record.heads),
        tensors=tensors,
        differences=frozenset(record.stored.differences),
        exported=record.exported,
    )
    return plan if allowed.head else _without_head(plan, record)


def _without_head(plan: Plan, record: Record) -> Plan:
    """The same without the task head.

    Raises:
        InvalidValue: nothing else is there.
    """
    if set(record.sites) <= set(record.heads):
        raise InvalidValue(f"`{record.name}` is a task head and nothing else, so head=False would leave nothing. Load it with its head.")
    kept = {key: tensor for key, tensor in plan.tensors.items() if not key.startswith(tuple(f"{head}." for head in record.heads))}
    return replace(plan, heads=(), tensors=kept)


def _tensors(folder: Path, record: Record, allowed: Allowed) -> dict[str, Tensor]:
    assert record.stored is not None
    tensors = read_tensors(folder / TENSORS, record.stored.sha256)
    broken = not_finite(tensors)
    if broken and not allowed.nonfinite:
        raise CheckpointError(f"`{folder / TENSORS}` holds NaN or infinity in {named(broken)}. Train again, or pass allow_nonfinite=True.")
    return tensors


def find(known: Index, title: str, keys: Iterable[str]) -> tuple[Site, ...]:
    """The sites with these keys, each once.

    Raises:
        CheckpointError: there is no such site; the nearest are named.
    """
    found = {key: _site(known, key) for key in keys}
    absent = [key for key, site in found.items() if site is None]
    if absent:
        raise CheckpointError(
            f"`{title}` sits at {named(absent)}, and this {type(known.backbone).__name__} has no such site. "
            f"{nearest(absent[0], [site.key for site in known])} Load the backbone it was trained on."
        )
    order = {id(site): k for k, site in enumerate(known)}  # as attach has them: optimizers know parameters by their position
    return tuple(dict.fromkeys(sorted((site for site in found.values() if site is not None), key=lambda site: order[id(site)])))


def _site(known: Index, key: str) -> Site | None:
    """The site with this key; for a parameter of a module that is never called, that module, as ``place`` takes it."""
    if key in known:
        return known[key]
    owner, _, parameter = key.rpartition(".")
    if owner not in known:
        return None
    site = known[owner]
    return None if site.reached or parameter not in site.parameters else site


def attach_plan(backbone: nn.Module, plan: Plan, allowed: Allowed) -> Delta:
    """Place a delta and fill it, or leave nothing behind.

    Raises:
        CheckpointError: it cannot be built, or the tensors do not fit.
    """
    delta = _placed(backbone, plan, allowed)
    try:
        if plan.exported:
            _export(delta)
        if plan.named is not None:
            plan = replace(plan, tensors=plan.named(delta, plan.tensors))
        _check_types(delta, plan.tensors)
        _take_types(delta, plan.tensors)
        _fill(delta, _fitted(delta, _values(delta, plan), allowed))
    except BaseException:
        detach(delta)
        raise
    return delta


def _export(delta: Delta) -> None:
    """Bring fresh patches into the exported form; those that reform themselves by the tensors need no help."""
    if isinstance(delta.method, Exported) and not any(isinstance(patch, Reforming) for patch in delta.patches):
        delta.method.export(delta.patches, delta.shared)
        refresh_gradients(delta)


def _placed(backbone: nn.Module, plan: Plan, allowed: Allowed) -> Delta:
    own = sum(_bytes(parameter) for module in modules_of(backbone).values() for parameter in module.parameters(recurse=False))
    limit = FLOOR + GROWTH * (own + sum(map(_bytes, plan.tensors.values())))
    fresh = ledger_of(backbone) is None
    try:
        with Bounded(limit, f"`{plan.title}` ({plan.method})"):
            return place(backbone, plan.method, plan.sites, plan.name, plan.heads, allow_idle=allowed.idle)
    except BaseException as cause:
        if fresh:
            close_ledger(backbone)
        if isinstance(cause, MISBUILT):
            raise CheckpointError(
                f"`{plan.title}` ({plan.method}) cannot be built: {cause}. Its record was edited; save it again."
            ) from cause
        raise


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _values(delta: Delta, plan: Plan) -> dict[str, Tensor]:
    """The tensors of the file with theta = theta_0 + difference written out."""
    state = dict(plan.tensors)
    for entry in delta.entries:
        if isinstance(entry.patch, SelectionPatch) and entry.key in plan.differences and entry.key in state:
            original, change = entry.choice.original, state[entry.key]
            if change.shape == original.shape:
                state[entry.key] = original + change.to(original.device)
    return state


def _fitted(delta: Delta, state: Mapping[str, Tensor], allowed: Allowed) -> dict[str, Tensor]:
    """The state with what is allowed to be missing, unexpected or misshapen made to fit."""
    if not (allowed.missing or allowed.unexpected or allowed.misshapen):
        return dict(state)
    own = delta.state_dict()
    reforming = [entry.key for entry in delta.entries if isinstance(entry.patch, Reforming)]
    fitted = {}
    for name, tensor in state.items():
        flexible = any(name.startswith(f"{key}.") for key in reforming) or name.startswith("shared.")
        if name not in own and not flexible and allowed.unexpected:
            continue
        misshapen = name in own and own[name].shape != tensor.shape and not flexible
        fitted[name] = own[name] if misshapen and allowed.misshapen else tensor
    if allowed.missing:
        fitted = {**{name: tensor for name, tensor in own.items() if not any(name.startswith(f"{key}.") for key in reforming)}, **fitted}
    return fitted


def _check_types(delta: Delta, tensors: Mapping[str, Tensor]) -> None:
    """Whole numbers, truths and complex numbers are no weights, and weights are no places or masks.

    Raises:
        CheckpointError: a tensor is of another kind than its place.
    """
    own = delta.state_dict()
    unlike = [name for name, tensor in tensors.items() if name in own and _kind(own[name]) != _kind(tensor)]
    if unlike:
        name = unlike[0]
        raise CheckpointError(
            f"Delta `{delta.name}` ({delta.method}) takes {own[name].dtype} at {named(unlike)}, and the file holds {tensors[name].dtype}. "
            "Copy or save it again."
        )


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _take_types(delta: Delta, tensors: Mapping[str, Tensor]) -> None:
    """What the delta owns is built in fp32; give each tensor the type it was saved in."""
    for key, module in delta.holders:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            saved = tensors.get(f"{key}.{name}")
            if saved is not None and saved.is_floating_point() and saved.dtype != tensor.dtype:
                tensor.data = tensor.data.to(saved.dtype)


def _fill(delta: Delta, state: Mapping[str, Tensor]) -> None:
    """Take over the tensors.

    Raises:
        CheckpointError: they do not fit.
    """
    try:
        delta.load_state_dict(state)
    except CheckpointError as cause:
        raise CheckpointError(
            f"{cause} load(..., allow_missing=True, allow_unexpected=True, allow_misshapen=True) each let one kind pass; a head for other "
            "labels stays out with head=False, and acts in routes by dt.bank(backbone).head(name, folder)."
        ) from cause
    except MISBUILT as cause:
        raise CheckpointError(f"The tensors do not fit delta `{delta.name}` ({delta.method}): {cause}. Save it again.") from cause
