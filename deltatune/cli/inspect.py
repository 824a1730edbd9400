"""``deltatune inspect``: where a delta can sit in a backbone and what it would train, or what a delta folder or a file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deltatune.checkpoint.record import RECORD
from deltatune.cli.commands import commands
from deltatune.cli.places import Layers, Where, layers_of, where_of
from deltatune.cli.skeleton import skeleton
from deltatune.cli.terminal import Json, facts, quoted, share, show, show_json, size, table
from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.methods.fields import in_short
from deltatune.methods.kinds import methods
from deltatune.methods.making import make, pairs, settings_of
from deltatune.structure.index import Index
from deltatune.structure.site import Site, size_of
from deltatune.structure.where import Matches, find_sites

if TYPE_CHECKING:
    from torch import nn

    from deltatune.injection.delta import Delta


@commands.register("inspect")
def inspect(
    delta: Annotated[
        str | None, typer.Argument(metavar="FILE|DIR", help="A delta of any library, or a .safetensors file: shows what it holds.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Alias, installed package, local folder, or hub id.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Put the head of this task on the backbone.")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="Mark what this method would train.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method; repeat it.")] = None,
    where: Where = None,
    layers: Layers = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site in a line of its own.")] = False,
    json: Json = False,
) -> None:
    """Show where a delta can sit in a backbone, and what would train; or what a delta folder or a file of tensors holds.

    Nothing is downloaded but the backbone's configuration, and no weight is read; of files only the headers are.

    deltatune inspect --backbone minilm
    deltatune inspect --backbone minilm --where "attention.*" --layers top:2
    deltatune inspect --backbone smollm2-135m --method lora --set rank=4
    deltatune inspect runs/bbc
    deltatune inspect adapter_model.safetensors
    """
    if (delta is None) == (backbone is None):
        raise InvalidValue("`inspect` shows either a delta or a backbone. Give a folder or a file, or --backbone NAME.")
    if delta is not None:
        _show_files(Path(delta).expanduser(), json)
        return
    assert backbone is not None
    model = skeleton(backbone, task)
    index = Index(model)
    recipe = make(method, pairs(set_ or [])) if method else None
    wanted = where_of(where) or (recipe.where if recipe else None)
    matches = find_sites(model, wanted, layers_of(layers), index)
    if recipe and recipe.reads_weights:
        for parameter in model.parameters():
            parameter.data.zero_()  # what was never written may be no number
    attached = attach(model, recipe, where_of(where), layers=layers_of(layers)) if recipe else None
    if json:
        show_json(_described(backbone, model, index, matches, attached))
        return
    _draw(backbone, model, index, matches, attached, sites)


def _show_files(place: Path, json: bool) -> None:
    """A delta of our own by its record; whatever else there is by its headers and configs."""
    from deltatune.cli.contents import is_native, show_contents
    from deltatune.cli.folder import show_folder

    place = place.parent if place.name == RECORD else place
    if is_native(place) or not place.exists():
        show_folder(str(place), json)
    else:
        show_contents(place, json)


def _draw(backbone: str, model: nn.Module, index: Index, matches: Matches, delta: Delta | None, sites: bool) -> None:
    from deltatune.structure.tree import tree

    depths = ", ".join(f"{depth} in {path}" for path, depth in index.depths.items())
    total = sum(size_of(parameter) for parameter in model.parameters()) if delta is None else delta.budget().N
    show(
        Text.assemble((backbone, "bold cyan"), "  ", (type(model).__name__, "bold")),
        "",
        facts(("parameters", f"{total:,}"), ("layers", depths)),
        "",
        tree(model, index),
        _every_site(matches) if sites else _roles(matches),
    )
    counts = _counts(matches)
    if counts:
        show(counts)
    if delta is None:
        hint = "`--method NAME` marks what a method would train, `--where` tries a pattern, `--sites` lists every site."
        show(quoted(hint, style="dim"))
        return
    budget = delta.budget()
    show(
        Text(f"{in_short(methods.name_of(type(delta.method)), settings_of(delta.method))} would train", style="bold"),
        facts(
            ("parameters", f"{budget.delta:,} of {budget.N:,} ({share(budget.delta, budget.N)})"),
            ("on disk", f"about {size(budget.size_bytes)}"),
            ("patches", f"{len(delta.entries):,}"),
        ),
    )


def _roles(matches: Matches) -> Any:
    """The matched sites, those that differ only in their layer folded into one line."""
    folded: dict[tuple[str, str, str], list[Site]] = {}
    for site in matches:
        folded.setdefault((site.role or "-", _pattern(site), shape_of(site)), []).append(site)
    drawn = table("role", "path", "shape", "sites", right=("shape", "sites"), whole=("role",))
    for (role, path, shape), group in folded.items():
        drawn.add_row(Text(role, style="cyan"), path.replace("#", _numbers(group)), shape, str(len(group)))
    return drawn


def _pattern(site: Site) -> str:
    """The site's key with the number of its layer, if it has one, as ``#``."""
    return site.key if site.layer is None else re.sub(rf"(?<![^.]){site.layer}(?![^.:])", "#", site.key, count=1)


def _numbers(group: Iterable[Site]) -> str:
    """``0..5`` for the layers of a group, or each of them where some are missing."""
    numbers = sorted({site.layer for site in group if site.layer is not None})
    if len(numbers) < 2 or numbers != list(range(numbers[0], numbers[-1] + 1)):
        return ",".join(map(str, numbers))
    return f"{numbers[0]}..{numbers[-1]}"


def _every_site(matches: Matches) -> Any:
    drawn = table("role", "key", "shape", "layer", right=("shape", "layer"), whole=("role",))
    for site in matches:
        layer = "-" if site.layer is None else str(site.layer)
        drawn.add_row(Text(site.role or "-", style="cyan"), site.key or "(the backbone)", shape_of(site), layer)
    return drawn


def _described(backbone: str, model: nn.Module, index: Index, matches: Matches, delta: Delta | None) -> dict[str, Any]:
    """What ``--json`` prints."""
    from deltatune.structure.tree import outline

    found = {
        "backbone": backbone,
        "class": type(model).__name__,
        "layers": index.depths,
        "where": matches.counts,
        "sites": [{"key": site.key, "role": site.role, "layer": site.layer, "shape": shape_of(site)} for site in matches],
        "tree": outline(model, index).as_dict(),
    }
    if delta is None:
        return found
    budget = delta.budget()
    trained = {"trainable_parameters": budget.delta, "total_parameters": budget.N, "ratio": budget.ratio, "delta_bytes": budget.size_bytes}
    return found | {"method": str(delta.method)} | trained


def _counts(matches: Matches) -> Any:
    """How many sites each entry of ``where`` hits."""
    if not matches.counts:
        return None
    drawn = table("where", "sites", right=("sites",), whole=("where",))
    for entry, count in matches.counts.items():
        drawn.add_row(Text(entry, style="cyan"), f"-{count}" if entry.startswith("!") else str(count))
    return drawn


def shape_of(site: Site) -> str:
    """The shape of a site's weight, the rows of its role where it has only some; empty where it has none."""
    tensor: Any = getattr(site.module, "weight", None) if site.parameter is None else site.weight
    if tensor is None or not hasattr(tensor, "shape"):
        return ""
    shape = list(tensor.shape)
    if site.rows is not None:
        shape[site.rows_axis(tensor)] = site.out_features
    return "x".join(map(str, shape))
