"""What commands print: tables and sentences for people, one JSON document for programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deltatune.errors import Noticed

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

PIPED_WIDTH = 140
"""Columns where there is no terminal to ask, so that a line of a table stays one line for grep."""


def console(stderr: bool = False) -> Console:
    """A console on today's standard output or error: tests and pipes replace them."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def show(*things: Any) -> None:
    """Print to standard output."""
    out = console()
    for thing in things:
        out.print(thing)


def show_command(line: str) -> None:
    """Print a command to type next, in one line however narrow the terminal is, so that it can be copied."""
    console().print(quoted(f"`{line}`", style="dim"), soft_wrap=True)


def note(text: str) -> None:
    """A sentence beside the result, on standard error."""
    console(stderr=True).print(quoted(text, style="dim"), soft_wrap=True)


@contextmanager
def noticing() -> Iterator[None]:
    """Within it, warnings of ours are notes without a place in the code."""
    others = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Noticed):
            note(f"Note: {message}")
        else:
            others(message, category, *where, **more)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = others


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say what takes its time: with a spinner for as long as it lasts on a terminal, in one line elsewhere."""
    err = console(stderr=True)
    if err.is_terminal:
        with err.status(quoted(text)):
            yield
    else:
        note(text)
        yield


def show_json(value: Any, *, one_line: bool = False) -> None:
    """Print a JSON document."""
    print(json.dumps(value, indent=None if one_line else 1, ensure_ascii=False, default=str), flush=True)


def show_error(message: str, hint: str = "") -> None:
    """A message in a frame on a terminal, and as a plain line elsewhere."""
    err = console(stderr=True)
    if not err.is_terminal:
        print(copyable(f"Error: {message}" + (f"\n{hint}" if hint else "")), file=sys.stderr, flush=True)
        return
    body = quoted(message)
    if hint:
        body.append("\n")
        body.append_text(quoted(hint, style="dim"))
    err.print(Panel(body, title="Error", title_align="left", border_style="red"))


def quoted(text: str, style: str = "") -> Text:
    """Prose with what stands in backticks set off; the backticks themselves go, and commands can be copied."""
    styled = Text(style=style)
    for position, part in enumerate(re.split(r"`+", copyable(text))):
        styled.append(part, style="cyan" if position % 2 else "")
    return styled


def copyable(text: str) -> str:
    """Prose whose commands in backticks run where they are pasted, whether or not the shell finds ``deltatune`` by its name."""
    return re.sub(r"`deltatune(?= )", lambda _: f"`{program()}", text)


def program() -> str:
    """``deltatune`` if that is how a shell finds what runs now; else its path, as it was called."""
    called = sys.argv[0]
    if Path(called).stem != "deltatune" or called == shutil.which("deltatune"):
        return "deltatune"
    return shlex.quote(called)


def table(*columns: str, title: str = "", right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """An empty table without lines between the columns.

    Args:
        columns: the headings.
        title: above it.
        right: headings whose cells stand at the right, as numbers do.
        whole: headings whose cells are never broken over lines.
    """
    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column in (*right, *whole), overflow="fold")
    return made


def facts(*rows: tuple[str, Any]) -> Table:
    """Names and values in two columns; rows without a value are left out."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, "", ()):
            made.add_row(name, quoted(value) if isinstance(value, str) else value if isinstance(value, Text) else str(value))
    return made


def size(count: float) -> str:
    """Bytes as people read them.

    >>> size(300), size(131_072), size(91_000_000)
    ('300 B', '131 kB', '91.0 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 100 * scale else 1}f} {unit}"
    return f"{count:.0f} B"


def share(part: float, whole: float) -> str:
    """A percentage with three digits that matter.

    >>> share(73_728, 22_713_216), share(1, 1)
    ('0.325%', '100%')
    """
    return f"{100 * part / whole:.3g}%" if whole else "0%"


def plural(count: int, word: str) -> str:
    """A count with its noun.

    >>> plural(1, "site"), plural(2000, "site")
    ('1 site', '2,000 sites')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"
