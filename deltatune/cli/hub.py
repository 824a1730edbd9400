"""``deltatune hub``: push deltas to a hub, pull them, list, show and search what it holds."""

from __future__ import annotations

import json as json_
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown
from rich.text import Text

from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, plural, program, quoted, show, show_json, size, table

if TYPE_CHECKING:
    from deltatune.checkpoint.hub import Entry

LOCATION = "DELTATUNE_HUB"

Hub = Annotated[
    str | None,
    typer.Option(
        metavar="LOCATION",
        help=f"A folder, a URL that fsspec knows (s3://bucket/deltas), or hf://OWNER[/NAME]. Left out: ${LOCATION}, else a folder here.",
    ),
]
Wanted = Annotated[str, typer.Argument(metavar="NAME", help="A name, an id, or the first digits of one; hf://OWNER/NAME.")]

hub = noun("Share deltas: push them to a folder, a bucket or the Hugging Face Hub, find them there, and pull them.")
commands.register("hub")(hub)


@hub.callback()
def overview(context: typer.Context, at: Annotated[str | None, typer.Option("--hub", hidden=True)] = None, json: Json = False) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(at, json)


@hub.command("push")
def push_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A delta's folder, or that of a run.")],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="What shall point to it; left out, its id alone does.")] = None,
    hub: Hub = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let the name point to this delta instead of another one.")] = False,
    json: Json = False,
) -> None:
    """Bring a delta to a hub. What is there already is not sent again.

    deltatune hub push runs/bbc bbc-lora
    deltatune hub push runs/bbc --hub hf://OWNER/bbc-lora
    """
    from deltatune.checkpoint import hub as shelf

    location = place(hub)
    id = shelf.push(folder, location, name, overwrite=overwrite, licence=_licence(folder))
    if json:
        show_json({"id": id, "name": name, "hub": location}, one_line=True)
        return
    show(quoted(f"{f'`{name}`' if name else 'It'} is `{id}` in `{location}`."))


@hub.command("pull")
def pull_(
    name: Wanted,
    hub: Hub = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Where to; called as the delta if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the delta that the folder holds.")] = False,
    json: Json = False,
) -> None:
    """Bring a delta from a hub; every file is checked against the hash its id stands for.

    deltatune hub pull bbc-lora --out bbc
    """
    from deltatune.checkpoint import hub as shelf

    location, wanted = asked(name, hub)
    folder = shelf.pull(location, wanted, out, overwrite=overwrite)
    if json:
        show_json({"folder": str(folder), "hub": location}, one_line=True)
        return
    here = shlex.quote(str(folder))
    show(quoted(f"It is in `{folder}`. `deltatune predict {here} TEXT` uses it, `deltatune inspect {here}` shows what it holds."))


@hub.command("list")
def listing(hub: Hub = None, json: Json = False) -> None:
    """List the deltas of a hub."""
    from deltatune.checkpoint import hub as shelf

    location = place(hub)
    found = shelf.entries(location)
    if found or json:
        _listed(found, location, json)
    else:
        show(quoted(_nothing(location, {})))


@hub.command("show")
def explain(name: Wanted, hub: Hub = None, json: Json = False) -> None:
    """Show one delta: its card, or with --json its facts."""
    from deltatune.checkpoint import hub as shelf

    location, wanted = asked(name, hub)
    entry, card = shelf.show(location, wanted)
    if json:
        show_json({**entry.to_json(), "card": card})
        return
    show(Markdown(_at(location, card.partition("---\n")[2].partition("---\n")[2])))


@hub.command("search")
def search_(
    hub: Hub = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Only deltas for this backbone: alias or hub id.")] = None,
    fingerprint: Annotated[str | None, typer.Option(metavar="DIGITS", help="Only for backbones whose fingerprint begins so.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Only deltas of this task.")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="Only deltas of this method.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="Only scores of this metric.")] = None,
    min_score: Annotated[float | None, typer.Option(metavar="SCORE", help="Only deltas with at least this score.")] = None,
    json: Json = False,
) -> None:
    """Find deltas in a hub, the best score first.

    deltatune hub search --backbone minilm --task bbc-news --min-score 0.9
    """
    from deltatune.checkpoint import hub as shelf

    location = place(hub)
    found = shelf.search(
        location,
        backbone=None if backbone is None else _same(backbone),
        fingerprint=fingerprint,
        task=task,
        method=method,
        metric=metric,
        min_score=min_score,
    )
    if found or json:
        _listed(found, location, json)
        return
    filters = {"backbone": backbone, "fingerprint": fingerprint, "task": task, "method": method, "metric": metric, "min-score": min_score}
    show(quoted(_nothing(location, filters)))


def place(location: str | None) -> str:
    """The hub: as asked, else what the environment names, else a folder in the user's own."""
    if location or (location := os.environ.get(LOCATION)):
        return location
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(base) / "deltatune" / "hub")


def asked(name: str, location: str | None) -> tuple[str, str | None]:
    """Hub and name; ``hf://OWNER/NAME`` in place of a name is both."""
    return (name, None) if name.startswith("hf://") else (place(location), name)


def _nothing(location: str, filters: Mapping[str, object]) -> str:
    """What to say where there is nothing to list."""
    words = " ".join(f"--{name} {value}" for name, value in filters.items() if value is not None)
    if not words:
        return f"`{location}` holds no delta yet. `deltatune hub push DIR NAME{_option(location)}` brings one."
    return f"No delta in `{location}` has all of `{words}`. `deltatune hub list{_option(location)}` shows what there is."


def _option(location: str) -> str:
    """What a command has to be told to look there."""
    return "" if location == place(None) else f" --hub {shlex.quote(location)}"


def _at(location: str, card: str) -> str:
    """A card with the place that it keeps to itself, so that what it says can be typed here."""
    here = card.replace('hub.pull("HUB"', f"hub.pull({json_.dumps(location)}").replace("--hub HUB", f"--hub {shlex.quote(location)}")
    return here.replace("deltatune hub pull", f"{program()} hub pull").replace("&& deltatune ", f"&& {program()} ")


def _listed(entries: Sequence[Entry], location: str, json: bool) -> None:
    if json:
        show_json([entry.to_json() for entry in entries])
        return
    drawn = table(
        "name", "id", "method", "backbone", "task", "score", "trained", "stored", right=("score", "trained", "stored"), whole=("name", "id")
    )
    for entry in entries:
        score = "-" if entry.score is None else f"{entry.score:.4f} {entry.metric or ''}".strip()
        drawn.add_row(
            Text(", ".join(entry.names) or "-", style="cyan"),
            entry.id[:12],
            entry.method if len(entry.methods) == 1 else f"{entry.method}: {', '.join(entry.methods)}",
            entry.backbone or entry.backbone_class,
            entry.task or "-",
            score,
            f"{entry.parameters:,}",
            size(entry.size_bytes),
        )
    at = _option(location)
    end = (
        f"{plural(len(entries), 'delta')} in `{location}`. "
        f"`deltatune hub show NAME{at}` explains one, `deltatune hub pull NAME{at}` brings it."
    )
    show(drawn, quoted(end, style="dim"))


def _same(backbone: str) -> tuple[str, ...]:
    """Everything the backbone is called: alias and hub id."""
    from deltatune.backbones.catalogue import catalogued

    known = catalogued(backbone)
    return (backbone,) if known is None else (backbone, known.name, known.hub_id)


def _licence(folder: str) -> str:
    """Licence of the backbone of a saved delta; empty if the catalogue does not know it."""
    from deltatune.backbones.catalogue import catalogued
    from deltatune.checkpoint.format import read

    id = read(folder).origin.id
    known = None if id is None else catalogued(id)
    return "" if known is None else known.licence
