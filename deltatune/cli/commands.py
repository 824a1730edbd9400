"""The table of commands: a function, or a ``typer.Typer`` with commands of its own, by the name one types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from deltatune.registry import Registry

Command = Callable[..., Any] | typer.Typer

commands: Registry[Command] = Registry("command", "commands")
"""Every command; other packages add theirs through the entry points ``deltatune.commands``."""


def noun(help: str) -> typer.Typer:
    """A command with commands below it, which does something by itself as well: ``deltatune tasks`` and ``deltatune tasks show NAME``."""
    return typer.Typer(help=help, invoke_without_command=True, rich_markup_mode="rich", context_settings=HELP)


HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
"""``-h`` works wherever ``--help`` does."""
