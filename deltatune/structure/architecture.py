"""What an architecture file holds: the roles of one family of models as path patterns, and nothing that computes.

A pattern is the end of a dotted path, matched at component boundaries, so that the same file describes ``BertModel``
and ``BertForSequenceClassification``. ``{layer}`` stands for the number of the layer and ``{i}`` for any other number.
Roles carry no ``encoder.`` or ``decoder.``: it is put in front where a model has layers below both names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_NUMBER = re.compile(r"^(\d+|\{\w+\})$")


@dataclass(frozen=True)
class Fused:
    """A projection, or ``module:parameter``, whose rows belong to several roles, laid out by a rule of ``rows.RULES``."""

    path: str
    roles: tuple[str, ...]
    rows: str


@dataclass(frozen=True)
class StackPattern:
    """A stack is the module that contains ``layers``, and it makes its input from ``input_ids`` or ``inputs_embeds``.

    Attributes:
        layers: path of the list of layers, below the stack.
        embedding: path of the token embedding, below the stack.
        inner: path of the module whose output ends the token sequence, if what follows reads single positions
            (BERT's pooler must not see virtual tokens); None if the stack's own output is the sequence.
    """

    layers: str
    embedding: str
    inner: str | None = None


@dataclass(frozen=True)
class Entry:
    """What one pattern says about the path it matches."""

    role: str | None
    parameter: str | None = None
    rows: str | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Architecture:
    """The anatomy of one family of models, as data.

    Attributes:
        model_types: the ``config.model_type`` of the models it describes.
        sites: role -> pattern or patterns; ``module:parameter`` is a parameter that ``module`` reads itself.
        fused: projections with several roles.
        parameters: ``module:parameter`` patterns of parameters without a role that ``module`` reads itself.
        stacks: the token stacks; empty where the input is not text.
        unreached: modules that hold parameters and are never called.
        unroutable: modules whose input rows are not a multiple of the batch.
    """

    model_types: tuple[str, ...]
    sites: Mapping[str, str | tuple[str, ...]]
    fused: tuple[Fused, ...] = ()
    parameters: tuple[str, ...] = ()
    stacks: tuple[StackPattern, ...] = ()
    unreached: tuple[str, ...] = ()
    unroutable: tuple[str, ...] = ()

    @cached_property
    def table(self) -> dict[str, list[Entry]]:
        """Generalised pattern -> what it says, for ``lookup``."""
        table: dict[str, list[Entry]] = {}
        for role, patterns in self.sites.items():
            for pattern in (patterns,) if isinstance(patterns, str) else patterns:
                _enter(table, pattern, role)
        for pattern in self.parameters:
            _enter(table, pattern, None)
        for fused in self.fused:
            for part, role in enumerate(fused.roles):
                _enter(table, fused.path, role, fused.rows, part, len(fused.roles))
        return table

    def lookup(self, path: str) -> list[Entry]:
        """What the longest pattern that ends ``path`` says; empty if none does."""
        general = generalise(path)
        while general:
            if general in self.table:
                return self.table[general]
            general = general.partition(".")[2]
        return []


def _enter(table: dict[str, list[Entry]], pattern: str, role: str | None, rows: str | None = None, part: int = 0, parts: int = 1) -> None:
    path, _, parameter = pattern.partition(":")
    table.setdefault(generalise(path), []).append(Entry(role, parameter or None, rows, part, parts))


def generalise(path: str) -> str:
    """``path`` with ``#`` for each component that is a number or a placeholder.

    >>> generalise("encoder.layer.3.output"), generalise("encoder.layer.{layer}.output")
    ('encoder.layer.#.output', 'encoder.layer.#.output')
    """
    return ".".join("#" if _NUMBER.match(component) else component for component in path.split("."))


def ends_with(path: str, pattern: str) -> bool:
    """Whether ``pattern`` is the end of ``path`` at a component boundary, with numbers generalised."""
    return f".{generalise(path)}".endswith(f".{generalise(pattern)}")
