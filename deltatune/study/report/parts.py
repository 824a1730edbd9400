"""What reports are made of: sections of sentences, tables and pictures, before it is known how they will be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headings.
        rows: cells, as they are shown.
        left: how many columns hold words; the others hold numbers and stand right.
        note: beneath it.
        strong: (row, column) of cells to set off, such as the best of a row.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file.
        figure: drawn.
        caption: what it shows, and what is to be seen.
    """

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: of it.
        text: sentences ahead of the blocks.
        blocks: tables and pictures.
    """

    title: str
    text: str = ""
    blocks: tuple[Table | Picture, ...] = ()
