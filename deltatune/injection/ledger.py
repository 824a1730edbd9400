"""The ledger: what is attached to one backbone, kept in the backbone itself.

It is the root's child ``deltatune``. A deep copy or pickle of the backbone carries it, so there is no global table of
deltas, and everything that must be known once per backbone is known here: the index of sites, what was frozen before,
which deltas act in which order, and the guard of weight swaps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn

from deltatune.errors import InvalidValue, UnknownName, Unsupported, nearest
from deltatune.injection.around import Around
from deltatune.injection.freeze import freeze, thaw
from deltatune.injection.sharding import reshard
from deltatune.injection.slot import CHILD, Slot, Term, check_vacant, slot_of
from deltatune.injection.statistics import Statistics
from deltatune.injection.watch import Watch
from deltatune.structure.index import Index, index

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
RESERVED = frozenset({*dir(nn.ModuleDict()), "mixer"})
"""Names that PyTorch would not let a child of a module have, and what a composition calls its own tensors."""

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes of PyTorch that take a module's parameters in hand once, when they are put around it."""

_open: WeakSet[Ledger] = WeakSet()
"""The ledgers alive: a module does not know what it lies in. Only asked before a backbone gets its first delta."""

if TYPE_CHECKING:
    from deltatune.injection.compose import Composition
    from deltatune.injection.delta import Delta
    from deltatune.injection.merge import Kept


class Ledger(nn.Module):
    """Everything attached to one backbone.

    Attributes:
        slot: the root module's own slot, where the root itself is a site.
        shared: state common to the sites of a delta, under the delta's name.
        deltas: the attached deltas, in order.
        compositions: the named compositions of them.
        terms: what acts, in order; merged deltas act through the weights.
        resting: how many ``disabled`` blocks are open; within them nothing acts.
        kept: parameters as they were before something was merged into them.
        around: what acts keep once per backbone.
        watch: the root's own hooks.
        statistics: layers whose running statistics stay as they are.
        frozen: ``requires_grad`` of each parameter before the first attach.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        _open.add(self)
        self.slot: Slot | None = None
        self.shared = nn.ModuleDict()
        self.deltas: dict[str, Delta] = {}
        self.compositions: dict[str, Composition] = {}
        self.terms: list[Term] = []
        self.resting = 0
        self.kept: list[Kept] = []
        self.frozen = freeze(backbone)
        self._index: Index | None = None
        self.around = Around()
        self.watch = Watch(self)
        self.statistics = Statistics(backbone)

    def forward(self, x: Any) -> Any:
        """Identity: a root that is a container and walks its children passes through."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _open.add(self)

    def index(self, backbone: nn.Module) -> Index:
        """The backbone's sites, walked once."""
        if self._index is None:
            self._index = index(backbone)
        return self._index

    def renewed_index(self, backbone: nn.Module) -> Index:
        """The same, walked anew where modules came, went or were replaced meanwhile; to be asked once an attach."""
        if self._index is not None and not self._index.is_current:
            self._index = None
        return self.index(backbone)

    @property
    def acting_terms(self) -> list[Term]:
        """What acts at this moment: nothing within ``disabled``."""
        return [] if self.resting else self.terms

    @property
    def acting_deltas(self) -> list[str]:
        """The names in it, in order."""
        return [member for term in self.acting_terms for member in term.members]

    def arrange(self, deltas: Iterable[str]) -> None:
        """Bring the slots that these deltas touch in line with ``terms``."""
        deltas = list(deltas)
        self._settle(deltas)
        # a merged delta acts through the weights; a selection is in them anyway
        unmerged = [term for term in self.acting_terms if len(term.members) > 1 or not self.deltas[term.members[0]].merged]
        for module, slot in self._slots(deltas):
            for act in slot.acts.values():
                act.arrange(module, unmerged if act.listens else self.acting_terms, slot.mixers)

    def append(self, term: Term) -> None:
        """Let one more term act, behind the others; none of its members is merged."""
        self.terms.append(term)
        if self.resting:
            return
        self._settle(term.members)
        for module, slot in self._slots(term.members):
            for act in slot.acts.values():
                act.append(module, term, slot.mixers)

    def _settle(self, deltas: Iterable[str]) -> None:
        """Parameters are written: they must not be copies that a forward left."""
        for name in deltas:
            reshard(self.deltas[name].backbone)
            return

    def _slots(self, deltas: Iterable[str]) -> Iterable[tuple[nn.Module, Slot]]:
        """The slots that these deltas touch, with their modules, once each."""
        slots: dict[int, tuple[nn.Module, Slot]] = {}
        for name in deltas:
            for entry in self.deltas[name].entries:
                for host in entry.hosts:
                    slot = slot_of(host.module)
                    if slot is not None:
                        slots[id(slot)] = (host.module, slot)
        return slots.values()

    def _apply(self, fn: Any, recurse: bool = True) -> Ledger:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for kept in self.kept:
            kept.original = fn(kept.original)
        return self

    def acting(self, term: Term) -> Delta | Composition:
        """The delta or composition that a term stands for."""
        if len(term.members) == 1:
            return self.deltas[term.members[0]]
        return next(composition for composition in self.compositions.values() if composition.members == term.members)

    def knows(self, name: str) -> bool:
        """Whether a delta or composition is called so."""
        return name in self.deltas or name in self.compositions

    def delta(self, name: str) -> Delta:
        """The delta of that name.

        Raises:
            UnknownName: none is attached under it.
        """
        if name in self.compositions:
            members = ", ".join(f"`{member}`" for member in self.compositions[name].members)
            raise UnknownName(f"`{name}` is a composition, not a delta. Name its members instead: {members}.")
        if name not in self.deltas:
            known = nearest(name, [*self.deltas, *self.compositions])
            raise UnknownName(f"No delta called `{name}` is attached to this backbone. {known}")
        return self.deltas[name]


def check_free(name: str, ledger: Ledger | None) -> None:
    """A delta or composition may be called ``name`` on a backbone with this ledger, or with none yet.

    Raises:
        InvalidValue: the name is malformed or taken.
    """
    if not NAME.fullmatch(name):
        raise InvalidValue(f"`{name}` cannot name a delta. Use letters, digits, `_` and `-`, as in `sst2-lora`, and pass it as name=.")
    if name in RESERVED:
        raise InvalidValue(f"`{name}` cannot name a delta: that name is taken by PyTorch's modules or by compositions. Choose another one.")
    if ledger is not None and ledger.knows(name):
        raise InvalidValue(f"Something called `{name}` is attached already. Choose another name=, or detach that first.")


def ledger_of(backbone: nn.Module) -> Ledger | None:
    """The backbone's ledger, or None where nothing is attached."""
    child = backbone._modules.get(CHILD)
    return child if isinstance(child, Ledger) else None


def open_ledger(backbone: nn.Module) -> Ledger:
    """The backbone's ledger; the first call freezes the backbone and remembers what was frozen before.

    Raises:
        Unsupported: deltas are attached to a module above or below this one.
        InvalidValue: the backbone has an attribute of its own called ``deltatune``.
    """
    ledger = ledger_of(backbone)
    if ledger is not None:
        return ledger
    _check_root(backbone)
    ledger = Ledger(backbone)
    ledger.train(backbone.training)
    backbone.add_module(CHILD, ledger)
    ledger.watch.listen(backbone)
    ledger.statistics.listen(backbone)
    return ledger


def _check_root(backbone: nn.Module) -> None:
    check_vacant(backbone)
    for ledger in list(_open):
        root = next((delta.backbone for delta in ledger.deltas.values()), None)
        if root is not None and any(module is backbone for module in root.modules()):
            raise Unsupported(
                f"This {type(backbone).__name__} cannot take a delta: it lies in a {type(root).__name__} to which deltas are attached "
                "already. Attach all deltas to one and the same module, or detach those first."
            )
    for path, module in backbone.named_modules():
        child = module._modules.get(CHILD)
        if isinstance(child, Ledger | Slot):
            where = "above it" if isinstance(child, Slot) and not path else f"at `{path}` inside it"
            raise Unsupported(
                f"This {type(backbone).__name__} cannot take a delta: deltas are attached already to a module {where}. "
                "Attach all deltas to one and the same module, or detach those first."
            )
        wrapped = WRAPPERS & {cls.__name__ for cls in type(module).__mro__}
        if wrapped:
            what = f"`{path}`" if path else "The backbone"
            raise Unsupported(
                f"{what} is wrapped in {wrapped.pop()} already, which would miss the delta's parameters. Attach first, then wrap."
            )


def close_ledger(backbone: nn.Module) -> None:
    """Remove the ledger of a backbone with no delta left, and restore what was frozen before."""
    ledger = ledger_of(backbone)
    if ledger is None or ledger.deltas:
        return
    ledger.watch.unlisten()
    ledger.statistics.unlisten()
    del backbone._modules[CHILD]
    thaw(backbone, ledger.frozen)
