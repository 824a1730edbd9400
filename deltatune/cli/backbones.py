"""``deltatune backbones``: the backbones known by a short name, and one in full."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from deltatune.backbones.catalogue import Backbone
from deltatune.backbones.catalogue import backbones as registered
from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, facts, quoted, show, show_json, table

backbones = noun("List the backbones that have a short name, or show one.")
commands.register("backbones")(backbones)


@backbones.callback()
def overview(context: typer.Context, json: Json = False) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(json)


@backbones.command("list")
def listing(json: Json = False) -> None:
    """List the backbones with a short name; folders and hub ids work as well."""
    found = sorted((registered[name] for name in registered), key=lambda entry: (not entry.is_installed, not entry.packages, entry.name))
    if json:
        show_json([described(entry) for entry in found])
        return
    drawn = table("backbone", "kind", "licence", "about", whole=("backbone", "kind"))
    heading = ""
    for entry in found:
        if heading != (heading := _weights(entry)):
            drawn.add_section()
            drawn.add_row(Text(heading, style="bold"))
        drawn.add_row(Text(f"  {entry.name}", style="cyan"), entry.kind, entry.licence, entry.description)
    end = "`--backbone` also takes a local folder or a hub id. `deltatune inspect --backbone NAME` shows the structure of one."
    show(drawn, quoted(end, style="dim"))


@backbones.command("show")
def explain(name: Annotated[str, typer.Argument(help="A backbone, such as minilm.")], json: Json = False) -> None:
    """Show one backbone: where its weights come from, and on what terms."""
    entry = registered[name]
    if json:
        show_json(described(entry))
        return
    show(
        Text.assemble((name, "bold cyan"), "  ", (entry.description, "bold")),
        "",
        facts(
            ("kind", entry.kind),
            ("weights", _weights(entry)),
            ("hub id", entry.hub_id),
            ("install", entry.install),
            ("licence", entry.licence),
        ),
    )


def described(entry: Backbone) -> dict[str, Any]:
    """A backbone as JSON lists it."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "installed": entry.is_installed,
        "hub_id": entry.hub_id,
        "packages": [package.pip for package in entry.packages],
        "install": entry.install,
        "licence": entry.licence,
        "description": entry.description,
    }


def _weights(entry: Backbone) -> str:
    """Where the weights are."""
    return "installed here" if entry.is_installed else "in a package" if entry.packages else "on the hub"
