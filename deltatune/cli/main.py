"""The door of the command line: gathers the commands, runs one, and turns what goes wrong into a message and an exit code.

| exit code | means |
|---|---|
| 0 | done |
| 1 | a fault of deltatune or of what lies beneath it |
| 2 | something asked for cannot be done: the message says what was found and what to do |
| 130 | stopped by the keyboard |
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer
from rich.markup import escape

import deltatune
from deltatune.cli.commands import HELP, Command, commands
from deltatune.cli.knobs import completed
from deltatune.cli.spoken import spoken
from deltatune.cli.terminal import note, noticing, program, show_error
from deltatune.errors import DeltaError, OutputError

PANELS: dict[str, tuple[str, ...]] = {
    "The main job": ("demo", "tune", "predict", "eval"),
    "What there is": ("inspect", "methods", "tasks", "backbones", "operators"),
    "Sharing": ("convert", "merge", "hub"),
    "Experiments": ("study",),
}
"""The built-in commands, as the help groups them; each is a module beside this one."""

INTRODUCTION = """Adapt a frozen pretrained model with small, separate sets of parameters: deltas.

deltatune tune --backbone minilm --task bbc-news --method lora --out runs/bbc
deltatune predict runs/bbc "Shares rise as the bank beats forecasts"
"""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG}
"""What the system says where a disk is full or a place may not be written."""

DEBUG = "--debug"

STOPPED = 130


def build() -> typer.Typer:
    """The whole command line, plug-ins included."""
    app = typer.Typer(
        name="deltatune",
        help=_coloured(INTRODUCTION),
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings=HELP,
    )
    app.callback()(root)
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    for name in panels:
        import_module(f"deltatune.cli.{name}")
    for name in [*panels, *(name for name in commands if name not in panels)]:
        _add(app, name, commands[name], panels.get(name, "More"))
    return app


def _add(app: typer.Typer, name: str, command: Command, panel: str) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name, rich_help_panel=panel)
    else:
        app.command(name, help=_coloured(inspect.getdoc(command) or ""), rich_help_panel=panel, no_args_is_help=name == "tune")(command)


def _coloured(text: str) -> str:
    """A help text with its paragraphs in a line each, for any width; those of command lines, its examples, are set off as they are."""
    paragraphs = [paragraph.splitlines() for paragraph in text.strip().split("\n\n")]
    return "\n\n".join("\n".join(_example(lines)) if lines[0].startswith("deltatune ") else " ".join(lines) for lines in paragraphs)


def _example(lines: list[str]) -> list[str]:
    """Lines behind click's sign that they are not to be joined, to be copied as they stand."""
    return ["\b", *(f"[cyan]{escape(program() + line.removeprefix('deltatune'))}[/]" for line in lines)]


def _version(asked: bool) -> None:
    if asked:
        print(f"deltatune {deltatune.__version__}")
        raise typer.Exit


def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """What stands ahead of every command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: what follows ``deltatune``; the process's own if left out.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in words
    try:
        with noticing():
            build()(completed([word for word in words if word != DEBUG]), prog_name=program())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        return stopped() if code == STOPPED else code
    except KeyboardInterrupt:
        return stopped()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what still waits in the buffer goes nowhere
        return 1
    except Exception as cause:
        return explain(cause, debug)
    return 0


def stopped() -> int:
    """Say that the keyboard ended it."""
    note("Stopped.")
    return STOPPED


def explain(cause: Exception, debug: bool) -> int:
    """Show what went wrong, and return the exit code that fits."""
    if debug:
        traceback.print_exception(cause)
    known = cause if isinstance(cause, DeltaError) else _disk(cause)
    if known is not None:
        show_error(spoken(str(known)))
        return 2
    what = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    hint = "" if debug else "This was not foreseen. Run it again with `--debug` for the traceback, and report it."
    show_error(what, hint)
    return 1


def _disk(cause: Exception) -> OutputError | None:
    """What a full or protected disk says, in our words; None for anything else."""
    if not isinstance(cause, OSError) or cause.errno not in DISK:
        return None
    place = f"`{cause.filename}`" if cause.filename else "a file"
    return OutputError(f"{place} cannot be written: {cause.strerror}. Free some space, or choose a folder you can write to.")


if __name__ == "__main__":
    sys.exit(main())
