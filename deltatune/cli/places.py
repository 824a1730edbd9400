"""Where a delta sits, as the command line says it: the options ``--where`` and ``--layers``."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from deltatune.errors import InvalidValue

PANEL = "Where it sits"

Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="A role such as attention.{query,value}, the end of a path, a glob, or re:...; ! in front excludes. "
        "Repeat it for several. Left out: the method's own.",
        rich_help_panel=PANEL,
    ),
]

Layers = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="Only these layers: 0-5, 0,2,4, top:3 or bottom:2. Left out: all.", rich_help_panel=PANEL),
]


def where_of(entries: list[str] | None) -> str | tuple[str, ...] | None:
    """What ``attach`` takes for the entries of ``--where``: None if there are none.

    Raises:
        InvalidValue: an empty entry.
    """
    if not entries:
        return None
    if not all(entry.strip() for entry in entries):
        raise InvalidValue("`--where` was given nothing. Write a role, a path or a pattern, or leave it out for the method's own sites.")
    return entries[0] if len(entries) == 1 else tuple(entries)


def layers_of(text: str | None) -> str | list[int] | None:
    """What ``attach`` takes for ``--layers``.

    >>> layers_of("0-2,5"), layers_of("top:3")
    ([0, 1, 2, 5], 'top:3')

    Raises:
        InvalidValue: neither numbers nor ``top:`` or ``bottom:``.
    """
    if text is None or re.fullmatch(r"\s*(top|bottom):\d+\s*", text):
        return text and text.strip()
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*(?:-|\.\.)\s*(\d+))?\s*", part)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise InvalidValue(f"`--layers '{text}'` cannot be read. Write `0-5`, `0,2,4`, `top:3` or `bottom:2`.")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers
