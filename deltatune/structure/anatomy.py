"""What is known about a backbone before its sites are made: roles of paths, stacks, and modules that are never called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from deltatune.structure.site import DELTA_CHILD as DELTA_CHILD
from deltatune.structure.site import Rows
from deltatune.structure.site import modules_of as modules_of


@dataclass(frozen=True)
class Assignment:
    """One role of one module: whole, a parameter it reads itself, or the rows of a fused projection."""

    role: str | None
    parameter: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class StackPaths:
    """Where a token stack, its token embedding and the module that ends its sequence are."""

    entry: str
    layers: str
    embedding: str
    inner: str | None = None


@dataclass
class Anatomy:
    """What is known about a backbone before its sites are made.

    Attributes:
        assignments: path of a module -> its roles; a module without an entry has none.
        stacks: the token stacks.
        unreached: modules PyTorch never calls.
        unroutable: modules whose input rows are not a multiple of the batch.
    """

    assignments: dict[str, list[Assignment]] = field(default_factory=dict)
    stacks: list[StackPaths] = field(default_factory=list)
    unreached: set[str] = field(default_factory=set)
    unroutable: set[str] = field(default_factory=set)

    def add(self, path: str, role: str | None, parameter: str | None = None, rows: Rows | None = None) -> None:
        """Give the module at ``path`` a role, once."""
        entries = self.assignments.setdefault(path, [])
        if not any((entry.role, entry.parameter) == (role, parameter) for entry in entries):
            entries.append(Assignment(role, parameter, rows))

    def rename(self, path: str, old: str, new: str) -> None:
        """Replace the beginning ``old`` of the roles at ``path`` by ``new``."""
        self.assignments[path] = [
            replace(entry, role=new + entry.role.removeprefix(old)) if entry.role and entry.role.startswith(old) else entry
            for entry in self.assignments.get(path, [])
        ]

    def paths(self, role: str) -> list[str]:
        """Paths of the modules that have ``role`` as a whole."""
        return [path for path, entries in self.assignments.items() if any(entry.role == role for entry in entries)]


def has_own_parameters(module: nn.Module) -> bool:
    """Whether ``module`` holds a parameter itself, not only below it."""
    return any(parameter is not None for parameter in module._parameters.values())


def has_parameters(module: nn.Module) -> bool:
    """Whether ``module`` or anything below it holds a parameter."""
    return next(module.parameters(), None) is not None


def output_rows(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Number of output rows of a projection, or of the experts' parameter (expert, out, in)."""
    for name in ("out_features", "nf"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return shape[-1] if getattr(module, "is_transposed", False) else shape[-2]
