"""Entries: the patches of a delta at their places, built and checked before anything of the backbone is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from deltatune.errors import NoSite, Unsupported
from deltatune.injection.branches import BranchAct
from deltatune.injection.outputs import OutputAct
from deltatune.injection.prefix import PrefixAct
from deltatune.injection.prompt import PromptAct
from deltatune.injection.selections import Choice, SelectionAct
from deltatune.injection.side import SideAct
from deltatune.injection.slot import Act, slot_of
from deltatune.injection.tokens import TokensAct, check_tokens
from deltatune.injection.weights import WeightAct
from deltatune.methods.kinds import (
    BranchInputPatch,
    BranchPatch,
    ConditionalPrefixPatch,
    InputPatch,
    Method,
    OutputPatch,
    Patch,
    PrefixPatch,
    PromptPatch,
    SelectionPatch,
    SidePatch,
    TokenPatch,
    WeightPatch,
)
from deltatune.structure.index import Index
from deltatune.structure.site import Site, modules_of
from deltatune.structure.where import Matches

ACTS: tuple[tuple[type[Patch], type[Act]], ...] = (
    (SelectionPatch, SelectionAct),
    (WeightPatch, WeightAct),
    (PrefixPatch, PrefixAct),
    (ConditionalPrefixPatch, PrefixAct),
    (PromptPatch, PromptAct),
    (SidePatch, SideAct),
    (InputPatch, OutputAct),
    (BranchInputPatch, OutputAct),
    (OutputPatch, OutputAct),
)
"""Which act runs which patch; the acts of a slot run in this order ahead of the forward, and in reverse behind it."""

ORDER = [BranchAct, TokensAct, *dict.fromkeys(act for _, act in ACTS)]
"""The acts, in that order; branches begin with what the caller gave."""


def order_of(act: type[Act]) -> int:
    """Place of an act in its slot: those added from outside stand innermost, next to the module's own forward."""
    return ORDER.index(act) if act in ORDER else len(ORDER)


@dataclass(frozen=True)
class Host:
    """A module whose slot runs a patch.

    Attributes:
        module: the module.
        parameter: what it calls the patched parameter, of the weight and selection kinds.
        act: what runs there; None for what runs patches of this kind.
    """

    module: nn.Module
    parameter: str = ""
    act: type[Act] | None = None


@dataclass
class Entry:
    """One patch of a delta at its place.

    Attributes:
        delta: name of the delta.
        site: where it sits.
        patch: what sits there.
        hosts: where it runs: at the site, and at every other owner of a tied parameter, or where its branch begins; of a
            selection, at one owner.
        head: it trains a freshly initialised task head, which is stored by value.
        flags: which of the patch's parameters train, by name.
        number: of several patches of the delta at the same place, which; from 0.
    """

    delta: str
    site: Site
    patch: Patch
    hosts: tuple[Host, ...]
    head: bool
    flags: dict[str, bool]
    number: int = 0

    @property
    def key(self) -> str:
        """Stable name in delta files: the site's key, or the parameter's path with its rows; numbered from the second on."""
        return f"{self.place}#{self.number}" if self.number else self.place

    @property
    def place(self) -> str:
        """The same for all patches of the delta there."""
        if isinstance(self.patch, WeightPatch | SelectionPatch):
            path = ".".join(part for part in (self.site.module_path, self.patch.parameter) if part)
            return path if self.site.rows is None else f"{path}:{self.site.leaf}"
        return self.site.key

    @property
    def act(self) -> type[Act]:
        """What runs the patch."""
        return act_of(self.patch)

    @property
    def choice(self) -> Choice:
        """Of a selection: the deltas that share its parameter."""
        assert isinstance(self.patch, SelectionPatch)
        slot = slot_of(self.hosts[0].module)
        assert slot is not None
        act = slot.acts[SelectionAct]
        assert isinstance(act, SelectionAct)
        return act.choices[self.hosts[0].parameter]

    @property
    def parameter(self) -> nn.Parameter:
        """Of a selection or weight patch: the backbone's Parameter."""
        assert isinstance(self.patch, SelectionPatch | WeightPatch)
        return self.site.module.get_parameter(self.patch.parameter)


def check_hits(matches: Matches, entries: Sequence[Entry], method: Method, kind: str) -> None:
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


def heads_of(index: Index) -> list[Site]:
    """Task heads, the outermost module of each."""
    found = [site for site in index.sites if (site.role or "").rpartition(".")[2] == "readout" and site.parameter is None]
    paths = [site.path for site in found]
    return [site for site in found if not any(site.path.startswith(f"{path}.") for path in paths)]


def build_entries(index: Index, method: Method, sites: Sequence[Site], shared: nn.Module | None, name: str) -> list[Entry]:
    """Build everything before anything is touched; what is met twice (whole, and as a role's rows) is taken once."""
    entries: list[Entry] = []
    taken: set[tuple[int, str]] = set()
    numbers: Counter[str] = Counter()
    heads = {id(module) for head in heads_of(index) for module in modules_of(head.module).values()}
    for site in _read_sites(index, sites):
        before = len(entries)
        for patch in method.build(site, shared):
            target: object = site.module
            hosts: tuple[Host, ...] = (Host(site.module),)
            if isinstance(patch, WeightPatch | SelectionPatch):
                target = _parameter(site, patch.parameter)
            rows = "" if site.rows is None else site.key
            if {(id(target), ""), (id(target), rows)} & taken:
                continue
            if isinstance(patch, WeightPatch):
                hosts = _hosts(index, site, patch)
            if isinstance(patch, BranchPatch | BranchInputPatch):
                hosts = (*hosts, Host(index.beginning(site).module, act=BranchAct))
            if isinstance(patch, TokenPatch):
                check_tokens(site, index)
                hosts = (*hosts, Host(site.module, act=TokensAct))
            act = act_of(patch)
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
            entry = Entry(name, site, patch, hosts, is_head, flags)
            entry.number = numbers[entry.place]
            numbers[entry.place] += 1
            entries.append(entry)
        taken |= {_target(entry) for entry in entries[before:]}
    return entries


def _parameter(site: Site, name: str) -> nn.Parameter:
    """The Parameter a patch names.

    Raises:
        Unsupported: it is computed from others there.
    """
    try:
        return site.module.get_parameter(name)
    except AttributeError as cause:
        raise Unsupported(
            f"`{name}` of `{site.path}` ({type(site.module).__name__}) is no Parameter: it is computed from others, as by weight_norm or "
            "spectral_norm. Choose other sites, or remove the parametrization first (torch.nn.utils.parametrize)."
        ) from cause


def head_entries(index: Index, heads: Sequence[Site], name: str, built: Sequence[Entry]) -> list[Entry]:
    """Let task heads train in full, but for the parameters that are selected already."""
    taken = {id(entry.parameter) for entry in built if isinstance(entry.patch, SelectionPatch)}
    return [
        Entry(name, site, patch, (_owner(index, site, patch),), True, {})
        for site in heads
        for patch in (SelectionPatch(parameter, by_value=True) for parameter in site.all_parameters)
        if id(site.module.get_parameter(patch.parameter)) not in taken
    ]


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


def act_of(patch: Patch) -> type[Act]:
    """What runs a patch of this kind."""
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
