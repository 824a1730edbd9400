"""A backbone as a tree: classes, shapes, roles, deltas, what trains; repeated layers folded into one line.

``outline`` computes the tree as plain data (what ``--json`` prints), ``tree`` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.errors import missing_extra
from deltatune.structure.anatomy import DELTA_CHILD
from deltatune.structure.index import Index
from deltatune.structure.index import index as index_of
from deltatune.structure.site import size_of

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass(frozen=True)
class Branch:
    """One module, or a run of modules that are alike.

    Attributes:
        name: its name below its parent; ``0..11`` for a run.
        kind: its class.
        repeats: how many modules it stands for.
        roles: its roles, those of a fused projection in the order of their rows.
        shapes: own parameter -> shape.
        trainable: how many of the parameters at and below it train.
        total: how many there are, a tied one counted where it is met first.
        added: how many trained parameters deltas have added at and below it.
        tied: its weight belongs to another module too.
        deltas: names of the deltas that sit on the module.
        children: what lies below.
    """

    name: str
    kind: str
    repeats: int = 1
    roles: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    trainable: int = 0
    total: int = 0
    added: int = 0
    tied: bool = False
    deltas: tuple[str, ...] = ()
    children: tuple[Branch, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The branch as JSON holds it."""
        own = {
            "name": self.name,
            "class": self.kind,
            "repeats": self.repeats,
            "roles": list(self.roles),
            "shapes": {name: list(shape) for name, shape in self.shapes},
            "trainable": self.trainable,
            "total": self.total,
            "added": self.added,
            "tied": self.tied,
            "deltas": list(self.deltas),
        }
        return own | {"children": [child.as_dict() for child in self.children]}


def outline(backbone: nn.Module, index: Index | None = None) -> Branch:
    """The folded tree of ``backbone`` as data.

    >>> [(child.name, child.repeats) for child in outline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).children]
    [('0..1', 2)]
    """
    index = index_of(backbone) if index is None else index
    roles: dict[str, list[str]] = {}
    for site in index:
        if site.role is not None:
            roles.setdefault(site.module_path, []).append(site.role)
    tied = {site.path for site in index if site.tied}
    return _branch("", "", backbone, roles, tied, set())


def _branch(name: str, path: str, module: nn.Module, roles: Mapping[str, list[str]], tied: set[str], seen: set[int]) -> Branch:
    children = [
        _branch(child_name, f"{path}.{child_name}" if path else child_name, child, roles, tied, seen)
        for child_name, child in module._modules.items()
        if child is not None and child_name != DELTA_CHILD
    ]
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    fresh = [parameter for parameter in own.values() if id(parameter) not in seen]
    seen.update(id(parameter) for parameter in fresh)
    return Branch(
        name=name,
        kind=type(module).__name__,
        roles=tuple(roles.get(path, ())),
        shapes=tuple((key, tuple(parameter.shape)) for key, parameter in own.items()),
        trainable=sum(parameter.numel() for parameter in fresh if parameter.requires_grad) + sum(c.trainable * c.repeats for c in children),
        total=sum(size_of(parameter) for parameter in fresh) + sum(child.total * child.repeats for child in children),
        added=_added(module) + sum(child.added * child.repeats for child in children),
        tied=path in tied,
        deltas=_deltas(module),
        children=tuple(_fold(children)),
    )


def _deltas(module: nn.Module) -> tuple[str, ...]:
    """Names of the deltas that hold patches in the module's slot."""
    child = module._modules.get(DELTA_CHILD)
    patches = getattr(getattr(child, "slot", child), "patches", None)  # the root's slot lies in the ledger
    return tuple(dict.fromkeys(name.partition("/")[0] for name in patches)) if isinstance(patches, nn.ModuleDict) else ()


def _added(module: nn.Module) -> int:
    """Number of parameters in the module's slot, or in the ledger of the root."""
    child = module._modules.get(DELTA_CHILD)
    return 0 if child is None else sum(parameter.numel() for parameter in child.parameters() if parameter.requires_grad)


def _fold(children: Sequence[Branch]) -> list[Branch]:
    """Join neighbours that differ only in their number."""
    folded: list[Branch] = []
    for child in children:
        last = folded[-1] if folded else None
        if last is not None and child.name.isdigit() and replace(last, name="", repeats=1) == replace(child, name=""):
            first = last.name.partition("..")[0]
            folded[-1] = replace(last, name=f"{first}..{child.name}", repeats=last.repeats + 1)
        else:
            folded.append(child)
    return folded


def tree(backbone: nn.Module, index: Index | None = None) -> Tree:
    """The folded tree of ``backbone``, to be printed with rich: trainable in green, frozen dimmed, deltas named.

    Raises:
        MissingExtra: rich is not installed.
    """
    try:
        from rich.tree import Tree
    except ImportError as cause:
        raise missing_extra("rich", "cli") from cause
    root = outline(backbone, index)
    drawn = Tree(_label(root), highlight=False)
    _draw(root.children, drawn)
    return drawn


def _draw(children: Sequence[Branch], onto: Tree) -> None:
    for child in children:
        _draw(child.children, onto.add(_label(child)))


def _label(branch: Branch) -> str:
    """One line in rich's markup."""
    words = [f"[bold]{branch.name}[/]" if branch.name else "", branch.kind]
    if branch.repeats > 1:
        words.append(f"x{branch.repeats}")
    shapes = [("" if name == "weight" else f"{name} ") + "x".join(map(str, shape)) for name, shape in branch.shapes if name != "bias"]
    words += [
        *shapes,
        "[yellow]tied[/]" if branch.tied else "",
        f"[cyan]{', '.join(branch.roles)}[/]" if branch.roles else "",
        *(f"[magenta]+{name}[/]" for name in branch.deltas),
    ]
    if branch.total:
        share = f"[green]{branch.trainable:,} of {branch.total:,} train[/]"
        words.append("[dim]frozen[/]" if not branch.trainable else "[green]trains[/]" if branch.trainable == branch.total else share)
    if branch.added and (branch.deltas or not branch.name):
        words.append(f"[green]{branch.added:,} added[/]")
    return " ".join(word for word in words if word)
