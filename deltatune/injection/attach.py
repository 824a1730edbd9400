"""Attach and detach: join a method's patches to the sites of a backbone, and take them away without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count

import torch
from torch import nn

from deltatune.errors import InvalidValue, NoSite, UnknownName, Unsupported
from deltatune.injection.delta import Delta, Entry, Host
from deltatune.injection.freeze import refresh_gradients
from deltatune.injection.ledger import NAME as NAME
from deltatune.injection.ledger import Ledger, close_ledger, ledger_of, open_ledger
from deltatune.injection.outputs import OutputAct
from deltatune.injection.prefix import PrefixAct
from deltatune.injection.prompt import PromptAct
from deltatune.injection.selections import SelectionAct
from deltatune.injection.slot import Act, Member, close_slot, open_slot, slot_of
from deltatune.injection.weights import WeightAct
from deltatune.methods.kinds import InputPatch, Method, OutputPatch, Patch, PrefixPatch, PromptPatch, SelectionPatch, Sharing, WeightPatch
from deltatune.methods.kinds import methods as registered
from deltatune.structure.index import Index
from deltatune.structure.site import Site, modules_of
from deltatune.structure.where import Layers, Matches, Where, find_sites

ACTS: tuple[tuple[type[Patch], type[Act]], ...] = (
    (SelectionPatch, SelectionAct),
    (WeightPatch, WeightAct),
    (PrefixPatch, PrefixAct),
    (PromptPatch, PromptAct),
    (InputPatch, OutputAct),
    (OutputPatch, OutputAct),
)
"""Which act runs which patch; the acts of a slot run in this order ahead of the forward, and in reverse behind it."""

ORDER = list(dict.fromkeys(act.__name__ for _, act in ACTS))


def attach(
    backbone: nn.Module,
    method: Method,
    where: Where | None = None,
    *,
    layers: Layers | None = None,
    name: str | None = None,
    head: bool = True,
) -> Delta:
    """Put a fresh delta on a backbone and enable it behind the deltas that act already.

    The backbone is frozen, and what was frozen before is remembered until the last delta is detached. A freshly
    initialised task head (role ``readout``) trains, and is saved and restored with the delta.

    Args:
        backbone: any module. It stays itself: same object, same class, its own modules under their own names.
        method: the recipe, such as ``LoRA(rank=8)``.
        where: role patterns, path suffixes, globs, ``re:...``, a callable, or a list of these with ``!...`` to
            exclude; the method's default roles if left out.
        layers: keep only sites of these layers: an int, a range, a list, or ``"top:3"``, ``"bottom:2"``.
        name: how the delta is called on this backbone; the method's name, numbered, if left out.
        head: whether a task head of the backbone belongs to the delta.

    Returns:
        The delta.

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
    if not isinstance(method, Method):
        raise InvalidValue(
            f"attach was given {method!r} as its method. Give an instance of a class in deltatune.methods, such as LoRA(rank=8)."
        )
    fresh = ledger_of(backbone) is None
    ledger = open_ledger(backbone)
    try:
        name = _free_name(ledger, method) if name is None else name
        asked = list(method.where) if where is None else where
        matches = _find(backbone, ledger, asked, layers)
        index = ledger.index(backbone)
        return place(backbone, method, matches.sites, name, _heads(index) if head else [], matches)
    except BaseException:
        if fresh:
            close_ledger(backbone)
        raise


def place(
    backbone: nn.Module, method: Method, sites: Sequence[Site], name: str, heads: Sequence[Site], matches: Matches | None = None
) -> Delta:
    """Build the patches for these sites and install them, all or none; ``attach`` and ``load`` end here."""
    ledger = open_ledger(backbone)
    ledger.check_free(name)
    shared = method.share(sites) if isinstance(method, Sharing) else None
    with _originals(backbone, ledger) if method.reads_weights else nullcontext():
        entries = _entries(ledger.index(backbone), method, sites, shared, name)
    if heads:  # they train in full, so a patch there would add nothing
        entries = [entry for entry in entries if not entry.head or isinstance(entry.patch, SelectionPatch)]
    _check_hits(matches or Matches(tuple(sites), hits={"the file": tuple(sites)}), entries, method, type(backbone).__name__)
    taken = {id(entry.parameter) for entry in entries if isinstance(entry.patch, SelectionPatch)}
    entries += [
        Entry(name, site, patch, (_owner(ledger.index(backbone), site, patch),), True, {})
        for site in heads
        for patch in (SelectionPatch(parameter, by_value=True) for parameter in site.all_parameters)
        if id(site.module.get_parameter(patch.parameter)) not in taken
    ]
    delta = Delta(name, method, backbone, entries, shared)
    if shared is not None:
        ledger.shared[name] = shared
    ledger.deltas[name] = delta
    try:
        for entry in entries:
            _install(backbone, ledger, entry)
        ledger.watch.add(entries)
        delta.enable()
    except BaseException:
        _remove(delta)
        raise
    return delta


def detach(delta: Delta) -> None:
    """Take a delta off its backbone, in whatever order; the last one leaves the backbone bit for bit as it was.

    Raises:
        Unsupported: it was detached already, or acts within a composition.
    """
    from deltatune.injection.merge import unmerge  # merging is built on attaching

    delta._check_alone("detach")
    if delta.merged:
        unmerge(delta)
    delta.disable()
    _remove(delta)
    close_ledger(delta.backbone)


def deltas(backbone: nn.Module) -> list[Delta]:
    """The attached deltas, in the order they were attached."""
    ledger = ledger_of(backbone)
    return [] if ledger is None else list(ledger.deltas.values())


def switch(backbone: nn.Module, name: str | None) -> None:
    """Let one delta or composition act and all others rest; None rests them all. Costs the same however many are attached.

    Raises:
        UnknownName: nothing attached has that name.
        Unsupported: a delta that would have to rest is merged; nothing is changed then.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        if name is not None:
            raise UnknownName(f"Cannot switch to delta `{name}`: nothing is attached to this backbone. Attach or load it first.")
        return
    chosen = None if name is None else ledger.compositions.get(name) or ledger.delta(name)
    others = [acting for term in ledger.terms if (acting := ledger.acting(term)) is not chosen]
    for other in others:
        if isinstance(other, Delta):
            other._check_unmerged("disable")
    for other in others:
        other.disable()
    if chosen is not None:
        chosen.enable()


@contextmanager
def disabled(backbone: nn.Module) -> Iterator[None]:
    """The plain backbone for a moment: no delta acts, and all act again as before at the end.

    Merged deltas stay in the weights: unmerge them first.
    """
    ledger = ledger_of(backbone)
    if ledger is None:
        yield
        return
    acting = ledger.acting_deltas
    ledger.resting += 1
    ledger.arrange(acting)
    try:
        yield
    finally:
        ledger.resting -= 1
        ledger.arrange(ledger.acting_deltas)
        for name in ledger.acting_deltas:
            refresh_gradients(ledger.deltas[name])


@contextmanager
def _originals(backbone: nn.Module, ledger: Ledger) -> Iterator[None]:
    """The backbone's own weights for a moment, without what is selected and what is merged."""
    merged = [(kept.module.get_parameter(kept.name), kept.original) for kept in ledger.kept]
    held = [theta.detach().clone() for theta, _ in merged]
    with disabled(backbone), torch.no_grad():
        for theta, original in merged:
            theta.copy_(original)
        try:
            yield
        finally:
            for (theta, _), value in zip(merged, held, strict=True):
                theta.copy_(value)


def _free_name(ledger: Ledger, method: Method) -> str:
    """The method's name, numbered where it is taken."""
    stem = registered.name_of(type(method)) if type(method) in _classes() else type(method).__name__.lower()
    stem = stem.replace("-", "_")
    return next(free for n in count(1) if not ledger.knows(free := stem if n == 1 else f"{stem}_{n}"))


def _find(backbone: nn.Module, ledger: Ledger, where: Where, layers: Layers | None) -> Matches:
    """The sites; the backbone is walked anew where modules were replaced or came since it was indexed."""
    known = ledger.is_indexed
    try:
        matches = find_sites(backbone, where, layers, ledger.index(backbone))
        if not any(_is_stale(backbone, site) for site in matches):
            return matches
    except NoSite:
        if not known:
            raise
    ledger.forget_index()
    return find_sites(backbone, where, layers, ledger.index(backbone))


def _is_stale(backbone: nn.Module, site: Site) -> bool:
    """The module was replaced since the backbone was indexed, as by resizing the vocabulary."""
    module: nn.Module | None = backbone
    for name in site.module_path.split(".") if site.module_path else ():
        module = None if module is None else module._modules.get(name)
    return module is not site.module


def _classes() -> set[type[Method]]:
    return {registered[name] for name in registered}


def _check_hits(matches: Matches, entries: Sequence[Entry], method: Method, kind: str) -> None:
    """Each entry of ``where`` must have led to a patch, not just to a site.

    Raises:
        NoSite: the method has nothing to do at any site of one entry.
    """
    patched = {_target(entry)[0] for entry in entries}
    places = {entry.site.key for entry in entries}
    for text, sites in matches.hits.items():
        if sites and not any(site.key in places or _identities(site) & patched for site in sites):
            shown = ", ".join(f"`{site.key or '(the backbone)'}`" for site in sites[:3])
            more = ", ..." if len(sites) > 3 else ""
            head = " A task head trains in full unless head=False." if all(site.leaf == "readout" for site in sites) else ""
            raise NoSite(
                f"{method} has nothing to do in {kind} where `{text}` hits ({shown}{more}).{head} Choose sites it can take (dt.find_sites)."
            )


def _identities(site: Site) -> set[int]:
    """The module and the parameters that patches of this site can target; a tied parameter is the same at every owner."""
    own = {id(site.module.get_parameter(name)) for name in site.parameters}
    return own if site.parameter is not None else own | {id(site.module)}


def _heads(index: Index) -> list[Site]:
    """Task heads, the outermost module of each."""
    found = [site for site in index.sites if (site.role or "").rpartition(".")[2] == "readout" and site.parameter is None]
    paths = [site.path for site in found]
    return [site for site in found if not any(site.path.startswith(f"{path}.") for path in paths)]


def _entries(index: Index, method: Method, sites: Sequence[Site], shared: nn.Module | None, name: str) -> list[Entry]:
    """Build everything before anything is touched; what is met twice (whole, and as a role's rows) is taken once."""
    entries: list[Entry] = []
    taken: set[tuple[int, str]] = set()
    heads = {id(module) for head in _heads(index) for module in modules_of(head.module).values()}
    for site in _read_sites(index, sites):
        before = len(entries)
        for patch in method.build(site, shared):
            target: object = site.module
            hosts: tuple[Host, ...] = (Host(site.module),)
            if isinstance(patch, WeightPatch | SelectionPatch):
                target = site.module.get_parameter(patch.parameter)
            rows = "" if site.rows is None else site.key
            if {(id(target), ""), (id(target), rows)} & taken:
                continue
            if isinstance(patch, WeightPatch):
                hosts = _hosts(index, site, patch)
            act = _act_of(patch)
            if act.listens:
                _check_reached(site)
            act.check(index, site, patch)
            patch.to(site.device)
            patch.train(site.module.training)
            flags = {key: parameter.requires_grad for key, parameter in patch.named_parameters()}
            is_head = id(site.module) in heads
            if isinstance(patch, SelectionPatch):
                patch.by_value = is_head
                hosts = (_owner(index, site, patch),)
            entries.append(Entry(name, site, patch, hosts, is_head, flags))
        taken |= {_target(entry) for entry in entries[before:]}
    return entries


def _target(entry: Entry) -> tuple[int, str]:
    """What an entry has taken: a parameter or a module, whole or in the rows of one role."""
    patched = entry.parameter if isinstance(entry.patch, WeightPatch | SelectionPatch) else entry.site.module
    return id(patched), "" if entry.site.rows is None else entry.site.key


def _read_sites(index: Index, sites: Sequence[Site]) -> list[Site]:
    """The sites, those of whole projections first, with a module that is never called replaced by its parameters at their reader."""
    found: list[Site] = []
    for site in sites:
        if site.reached or not site.parameters:
            found.append(site)
            continue
        for own in site.parameters:
            module, parameter = index.reader(site.path, own)
            found.append(replace(site, path=f"{site.path}.{own}", module=module, parameter=parameter, reached=True))
    return sorted(found, key=lambda site: site.rows is not None)


def _check_reached(site: Site) -> None:
    """Refuse a module that is never called.

    Raises:
        Unsupported: a patch there would never run.
    """
    if not site.reached:
        raise Unsupported(
            f"A patch at `{site.path}` ({type(site.module).__name__}) would never run: PyTorch walks this container's children, or reads "
            "its parameters, without calling it. Choose the modules inside it, or a role its caller gives it; dt.find_sites lists both."
        )


def _act_of(patch: Patch) -> type[Act]:
    return next(act for kind, act in ACTS if isinstance(patch, kind))


def _hosts(index: Index, site: Site, patch: WeightPatch) -> tuple[Host, ...]:
    """Where the parameter is read: at the site, and by the readers of a tied one's other owners."""
    own = site.module.get_submodule(patch.parameter.rpartition(".")[0])
    owners = index.owners(site.module.get_parameter(patch.parameter))
    others = [Host(*index.reader(path.removesuffix(name).rstrip("."), name)) for owner, name, path in owners if owner is not own]
    return (Host(site.module, patch.parameter), *others)


def _owner(index: Index, site: Site, patch: SelectionPatch) -> Host:
    """Where a selected parameter is kept, whichever site, and whichever owner of a tied one, it was selected at."""
    owner, name, _ = index.owners(site.module.get_parameter(patch.parameter))[0]
    return Host(owner, name)


def _install(backbone: nn.Module, ledger: Ledger, entry: Entry) -> None:
    kind = _act_of(entry.patch)
    for k, host in enumerate(entry.hosts):
        module = host.module
        slot = open_slot(module)
        act = slot.acts.get(kind.__name__)
        fresh = act is None
        if act is None:
            act = kind(module)
            slot.acts = dict(sorted({**slot.acts, kind.__name__: act}.items(), key=lambda item: ORDER.index(item[0])))
        if k == 0:
            key = next(key for key in _keys(entry.delta) if key not in slot.patches)
            slot.patches[key] = entry.patch
        act.add(module, Member(entry.delta, entry.site, entry.patch, host.parameter))
        if fresh:
            act.join(ledger.around, backbone, ledger.index(backbone), entry.site)
        slot.listen(module)


def _keys(delta: str) -> Iterator[str]:
    """Names of a delta's patches in a slot: ``<delta>``, then ``<delta>/1`` and so on where a fused projection has several."""
    yield delta
    yield from (f"{delta}/{k}" for k in count(1))


def _remove(delta: Delta) -> None:
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
    for name, act in list(slot.acts.items()):
        act.remove(module, entry.delta)
        if not act.members:
            del slot.acts[name]
            act.leave(ledger.around)
    if not slot.acts:
        close_slot(module)
