"""``deltatune methods``: every delta method, and one in full."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, facts, quoted, show, show_command, show_json, table
from deltatune.injection.mixers import MIXERS
from deltatune.injection.slot import How
from deltatune.injection.ways import LETTERS, WAYS, way_called
from deltatune.methods.fields import REQUIRED, MethodField, fields_of, formula_of, in_words, summary_of
from deltatune.methods.kinds import Exported, Grouped, Method, Penalised, Phased, Prepared, Sharing, Stepping
from deltatune.methods.kinds import methods as registered
from deltatune.methods.measured import budget, measured

FAMILIES = ("addition", "specification", "reparameterization", "baseline")

MEANINGS = {
    "output": "edits what a module returns, or what it is given",
    "weight": "edits a parameter as it is read",
    "context": "adds virtual positions",
    "selection": "trains parameters of the backbone in place",
}

LIFE: dict[type, str] = {
    Sharing: "shares parameters between its sites",
    Prepared: "looks at data before the first step",
    Penalised: "adds a term to the loss",
    Phased: "trains in phases",
    Stepping: "acts between steps",
    Grouped: "has learning rates of its own",
    Exported: "shrinks when training ends",
}

methods = noun("List the delta methods, or show one: its formula, fields, defaults and source.")

commands.register("methods")(methods)


@methods.callback()
def overview(context: typer.Context, json: Json = False) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(json)


@methods.command("list")
def listing(json: Json = False) -> None:
    """List the delta methods."""
    if json:
        show_json([described(name) for name in ordered()])
        return
    drawn = table("method", "kind", "what it is", whole=("method", "kind"))
    heading = ""
    for name in ordered():
        recipe = registered[name]
        if heading != (heading := _family(recipe)):
            drawn.add_section()
            drawn.add_row(Text(heading, style="bold"))
        drawn.add_row(Text(f"  {name}", style="cyan"), recipe.kind, summary_of(recipe))
    ways = ", ".join(how + (f" ({way.called})" if way.called else "") for how, way in WAYS.items())
    hints = (f"Several deltas act as one by `dt.compose`: {ways}.", "`deltatune methods show NAME` explains one.")
    show(drawn, facts(*MEANINGS.items()), "", *(quoted(hint, style="dim") for hint in hints))


@methods.command("show")
def explain(name: Annotated[str, typer.Argument(help="A method, such as lora.")], json: Json = False) -> None:
    """Show one method, or one way to compose: formula, fields and defaults, default sites, source."""
    if (how := way_called(name)) and name not in registered:
        _explain_way(how, json)
        return
    recipe = registered[name]
    if json:
        show_json(described(name))
        return
    fields, row = fields_of(recipe), measured(name)
    show(
        *_heading(name, f"{recipe.__name__}: {summary_of(recipe)}", formula_of(recipe)),
        facts(
            ("family", _family(recipe)),
            ("kind", f"{recipe.kind}: {MEANINGS[recipe.kind]}"),
            ("where", ", ".join(recipe.where)),
            ("fresh", "leaves the outputs as they are" if recipe.identity else "changes the outputs"),
            ("learning rate", f"{recipe.learning_rate:g}"),
            ("in training", "; ".join(lives(recipe))),
            ("source", recipe.source),
            *([("measured", f"{row} ({budget()})")] if row is not None else []),
        ),
        _fields(fields),
    )
    show_command(_example(name, fields))


def _explain_way(how: How, json: bool) -> None:
    """A way to compose: not a recipe for one delta, but looked for among them."""
    way, mixer = WAYS[how], MIXERS.get(how)
    rate, call = mixer.learning_rate if mixer else None, f'dt.compose(backbone, ["a", "b"], how="{how}")'
    if json:
        show_json({"name": how, "kind": "composition", **dataclasses.asdict(way), "learning_rate": rate, "call": call})
        return
    show(
        *_heading(how, f"{way.called or 'Composition'}: {way.summary}", f"{way.formula}\n\n{LETTERS}"),
        facts(("kind", "composition: makes attached deltas act as one"), ("learning rate", rate), ("source", way.source)),
        quoted(f"\n`{call}` takes the names of deltas that are attached.", style="dim"),
    )


def _heading(name: str, summary: str, formula: str) -> tuple[Text, Padding]:
    return (
        Text.assemble((name, "bold cyan"), "  ", (summary, "bold")),
        Padding(Text(flowing(formula).replace("``", "")), (1, 0, 1, 2)),
    )


def flowing(text: str) -> str:
    """A docstring's text with its paragraphs in a line each, for any width; what is indented, such as formulas, stays as it is."""
    paragraphs = (part if part.startswith(" ") else " ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(paragraphs)


def ordered() -> list[str]:
    """The names, family by family."""
    families = {family: position for position, family in enumerate(FAMILIES)}
    return sorted(registered, key=lambda name: (families.get(registered[name].family, len(families)), registered[name].sub_family, name))


def described(name: str) -> dict[str, Any]:
    """A method as JSON tells it."""
    recipe, row = registered[name], measured(name)
    return {
        "name": name,
        "family": recipe.family,
        "sub_family": recipe.sub_family,
        "kind": recipe.kind,
        "summary": summary_of(recipe),
        "formula": formula_of(recipe),
        "where": list(recipe.where),
        "identity": recipe.identity,
        "learning_rate": recipe.learning_rate,
        "source": recipe.source,
        "measured": None if row is None else dataclasses.asdict(row),
        "fields": [_described_field(field) for field in fields_of(recipe)],
    }


def _described_field(field: MethodField) -> dict[str, Any]:
    required = field.default is REQUIRED
    return {
        "name": field.name,
        "type": field.type_name,
        "required": required,
        "default": None if required else field.default,
        "meaning": field.meaning,
    }


def lives(recipe: type[Method]) -> list[str]:
    """What a method does in training besides being trained."""
    return [words for kind, words in LIFE.items() if all(hasattr(recipe, name) for name in _declared(kind))]


def _declared(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def _fields(fields: tuple[MethodField, ...]) -> Any:
    if not fields:
        return Text("\nIt has no fields.\n")
    drawn = table("field", "default", "meaning", right=("default",), whole=("field",))
    for field in fields:
        takes = in_words(field.hint)
        meaning = quoted(f"{field.meaning} ").append_text(quoted(f"{takes[:1].upper()}{takes[1:]}.", style="dim"))
        drawn.add_row(Text(field.name, style="cyan"), field.default_text or "-", meaning)
    return drawn


def _family(recipe: type[Method]) -> str:
    return recipe.family + (f", {recipe.sub_family}" if recipe.sub_family else "")


def _example(name: str, fields: tuple[MethodField, ...]) -> str:
    setting = f" --set {fields[0].example}" if fields else ""
    return f"deltatune tune --backbone minilm --task bbc-news --method {name}{setting} --out runs/{name}"
