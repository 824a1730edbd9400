"""Attach and detach: join a method's patches to the sites of a backbone, and take them away without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from typing import TypeVar, overload

from torch import nn

from deltatune.errors import InvalidValue
from deltatune.injection.branches import Given
from deltatune.injection.compose import Composition, compose
from deltatune.injection.delta import Delta
from deltatune.injection.entries import Entry, build_entries, check_hits, head_entries, heads_of, order_of
from deltatune.injection.ledger import Ledger, check_free, close_ledger, ledger_of, open_ledger
from deltatune.injection.recompute import Keeper
from deltatune.injection.refusals import check_alone, check_backbone, check_kind, check_names
from deltatune.injection.slot import Act, Member, Slot, close_slot, open_slot, slot_of
from deltatune.injection.switching import unchanged
from deltatune.methods.checks import check_types
from deltatune.methods.kinds import Method, SelectionPatch, Sharing, Surveying
from deltatune.methods.kinds import methods as registered
from deltatune.structure.site import Site
from deltatune.structure.where import Layers, Matches, Where, find_sites

AnyAct = TypeVar("AnyAct", bound=Act)


@overload
def attach(
    backbone: nn.Module,
    method: Method,
    where: Where | None = None,
    *,
    layers: Layers | None = None,
    name: str | None = None,
    head: bool = True,
    allow_idle: bool = False,
) -> Delta: ...


@overload
def attach(
    backbone: nn.Module,
    method: Sequence[Method],
    where: Where | None = None,
    *,
    layers: Layers | None = None,
    name: str | None = None,
    head: bool = True,
    allow_idle: bool = False,
) -> Delta | Composition: ...


def attach(
    backbone: nn.Module,
    method: Method | Sequence[Method],
    where: Where | None = None,
    *,
    layers: Layers | None = None,
    name: str | None = None,
    head: bool = True,
    allow_idle: bool = False,
) -> Delta | Composition:
    """Put a fresh delta on a backbone and enable it behind the deltas that act already.

    The backbone is frozen, and what was frozen before is remembered until the last delta is detached. A freshly
    initialised task head (role ``readout``) trains, and is saved and restored with the delta.

    Args:
        backbone: any module. It stays itself: same object, same class, its own modules under their own names.
        method: the recipe, such as ``LoRA(rank=8)``; or a list of them, of which each becomes a delta, one acting
            behind the other, and the first takes the head.
        where: role patterns, path suffixes, globs, ``re:...``, a callable, or a list of these with ``!...`` to
            exclude; the method's default roles if left out.
        layers: keep only sites of these layers: an int, a range, a list, or ``"top:3"``, ``"bottom:2"``.
        name: how the delta is called on this backbone; the method's name, numbered, if left out. Of several, how
            their composition is called.
        head: whether a task head of the backbone belongs to the delta.
        allow_idle: take sites that a forward may never call, where the delta does nothing; else that is an error
            (``Idle``) once it is seen.

    Returns:
        The delta; the sequential composition of them where several were asked for.

    Raises:
        NoSite: an entry of ``where`` hits nothing, or the method has nothing to do at the sites it hits.
        Unsupported: a site cannot take this method.
        InvalidValue: the name is taken or malformed.

    Example:
        >>> from deltatune.methods import LoRA
        >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> delta = attach(mlp, LoRA(rank=2), where=["0", "2"])
        >>> print(delta.budget())
        84 of 178 parameters (47.191%), 336 bytes
        >>> detach(delta)
    """
    check_backbone(backbone, "attach")
    if isinstance(method, list | tuple) and method:
        return _attach_all(backbone, method, where, layers, name, head=head, allow_idle=allow_idle)
    if not isinstance(method, Method):
        raise InvalidValue(
            f"attach was given {method!r} as its method. Give an instance of a class in deltatune.methods, such as LoRA(rank=8)."
        )
    check_types(method)
    fresh = ledger_of(backbone) is None
    ledger = open_ledger(backbone)
    try:
        name = _free_name(ledger, method) if name is None else name
        index = ledger.renewed_index(backbone)
        matches = find_sites(backbone, list(method.where) if where is None else where, layers, index)
        return place(backbone, method, matches.sites, name, heads_of(index) if head else [], matches, allow_idle=allow_idle)
    except BaseException:
        if fresh:
            close_ledger(backbone)
        raise


def _attach_all(
    backbone: nn.Module,
    methods: Sequence[Method],
    where: Where | None,
    layers: Layers | None,
    name: str | None,
    *,
    head: bool,
    allow_idle: bool,
) -> Delta | Composition:
    """Attach each and compose them, or leave nothing behind."""
    if len(methods) == 1:
        return attach(backbone, methods[0], where, layers=layers, name=name, head=head, allow_idle=allow_idle)
    placed: list[Delta] = []
    try:
        for method in methods:
            placed.append(attach(backbone, method, where, layers=layers, head=head and not placed, allow_idle=allow_idle))
        return compose(backbone, placed, name=name)
    except BaseException:
        for delta in reversed(placed):
            detach(delta)
        raise


def place(
    backbone: nn.Module,
    method: Method,
    sites: Sequence[Site],
    name: str,
    heads: Sequence[Site],
    matches: Matches | None = None,
    *,
    allow_idle: bool = False,
) -> Delta:
    """Build the patches for these sites and install them, all or none; ``attach`` and ``load`` end here."""
    ledger = open_ledger(backbone)
    check_free(name, ledger)
    if isinstance(method, Surveying):
        method.survey(sites)
    shared = method.share(sites) if isinstance(method, Sharing) else None
    with unchanged(backbone, ledger) if method.reads_weights else nullcontext():
        entries = build_entries(ledger.index(backbone), method, sites, shared, name)
    if heads:  # they train in full, so a patch there would add nothing
        entries = [entry for entry in entries if not entry.head or isinstance(entry.patch, SelectionPatch)]
    if method.trains:
        check_hits(matches or Matches(tuple(sites), hits={"the file": tuple(sites)}), entries, method, type(backbone).__name__)
    entries += head_entries(ledger.index(backbone), heads, name, entries)
    check_names(entries, shared)
    delta = Delta(name, method, backbone, entries, shared)
    if shared is not None:
        ledger.shared[name] = shared
    ledger.deltas[name] = delta
    try:
        for entry in entries:
            install(backbone, ledger, entry)
        ledger.watch.add(entries, allow_idle=allow_idle)
        delta.enable()
    except BaseException:
        remove(delta)
        raise
    return delta


def detach(delta: Delta | Composition) -> None:
    """Take a delta off its backbone, in whatever order; the last one leaves the backbone bit for bit as it was.

    A composition is dissolved, and its members are taken off.

    Raises:
        Unsupported: it was detached already, or acts within a composition.
    """
    from deltatune.injection.merge import unmerge  # merging is built on attaching

    check_kind(delta, (Delta, Composition), "detach")
    if isinstance(delta, Composition):
        members = delta.deltas
        delta.disable()
        delta.dissolve()
        for member in reversed(members):
            detach(member)
        return
    check_alone(delta, "detach")
    if delta.merged:
        unmerge(delta)
    delta.disable()
    remove(delta)
    close_ledger(delta.backbone)


def _free_name(ledger: Ledger, method: Method) -> str:
    """The method's name, numbered where it is taken."""
    stem = registered.name_of(type(method)) if type(method) in _classes() else type(method).__name__.lower()
    return next(free for n in count(1) if not ledger.knows(free := stem if n == 1 else f"{stem}-{n}"))


def _classes() -> set[type[Method]]:
    return {registered[name] for name in registered}


def install(backbone: nn.Module, ledger: Ledger, entry: Entry) -> None:
    """Put the patch of one entry into the slots of its hosts; it acts once a term names its delta."""
    given = Given() if any(host.act is not None for host in entry.hosts) else None
    for k, host in enumerate(entry.hosts):
        module, kind = host.module, host.act or entry.act
        slot = open_slot(module)
        act = slot.acts.get(kind)
        fresh = act is None
        if slot.keeper is None:
            slot.keeper = Keeper(ledger.around.recomputing)
        if act is None:
            act = add_act(slot, kind(module))
        if k == 0:
            key = next(key for key in _keys(entry.delta) if key not in slot.patches)
            slot.patches[key] = entry.patch
        act.add(module, Member(entry.delta, entry.site, entry.patch, host.parameter, given))
        if fresh:
            act.join(ledger.around, backbone, ledger.index(backbone), entry.site)
        slot.listen(module)


def add_act(slot: Slot, act: AnyAct) -> AnyAct:
    """Put an act into a slot, at its place among the others."""
    acts: dict[type[Act], Act] = {**slot.acts, type(act): act}
    slot.acts = {kind: acts[kind] for kind in sorted(acts, key=order_of)}
    return act


def _keys(delta: str) -> Iterator[str]:
    """Names of a delta's patches in a slot: ``<delta>``, then ``<delta>/1`` and so on where a fused projection has several."""
    yield delta
    yield from (f"{delta}/{k}" for k in count(1))


def remove(delta: Delta) -> None:
    """Take a delta that rests out of its slots and its ledger."""
    ledger = delta.ledger
    ledger.terms = [term for term in ledger.terms if delta.name not in term.members]
    ledger.arrange([delta.name])
    ledger.watch.drop(delta.name)
    for entry in delta.entries:
        for host in entry.hosts:
            _clear(ledger, host.module, entry)
    del ledger.deltas[delta.name]
    if delta.name in ledger.shared:
        del ledger.shared[delta.name]


def _clear(ledger: Ledger, module: nn.Module, entry: Entry) -> None:
    slot = slot_of(module)
    if slot is None:
        return
    for key in _keys(entry.delta):
        if key not in slot.patches:
            break
        del slot.patches[key]
    for kind, act in list(slot.acts.items()):
        act.remove(module, entry.delta)
        if not act.members:
            slot.acts = {other: kept for other, kept in slot.acts.items() if other is not kind}  # a forward may be walking them
            act.leave(ledger.around)
    if not slot.acts:
        close_slot(module)
