"""``deltatune operators``: what multiplies each row of a batch with the matrices of its own delta, and the loops that are compiled."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
import typer
from rich.text import Text

from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, copyable, quoted, show, show_json, table, working

operators = noun("List the operators of routed batches, or compile the fastest one for this machine.")
commands.register("operators")(operators)


@operators.callback()
def overview(context: typer.Context, json: Json = False) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(json)


@operators.command("list")
def listing(json: Json = False) -> None:
    """List the operators, and which of them can run here."""
    found = described()
    if json:
        show_json(found)
        return
    drawn = table("operator", "here", "what it is for", whole=("operator",))
    for one in found:
        here = Text("yes", style="green") if one["available"] else Text(one["missing"], style="yellow")
        drawn.add_row(Text(one["name"], style="cyan"), here, one["about"])
    show(drawn)
    if not next(one["available"] for one in found if one["name"] == "native"):
        end = "`deltatune operators compile`: half a minute, and decoding with many deltas and training LoRA are faster on this processor."
        show(quoted(end, "dim"))


@operators.command("compile")
def compile_here(json: Json = False) -> None:
    """Compile the loops for decoding with many deltas and for training LoRA on a CPU, once for this machine; it needs a C++ compiler."""
    from deltatune.compiled.library import compile_library, library_file

    there, began = library_file().exists(), time.perf_counter()
    with working("Compiling the operators for this processor"):
        file = compile_library()
    seconds = round(time.perf_counter() - began, 1)
    if json:
        show_json({"file": str(file), "compiled": not there, "seconds": seconds})
    else:
        show(f"Compiled already: {copyable(str(file))}" if there else f"Compiled in {seconds:.0f} s: {copyable(str(file))}")


def described() -> list[dict[str, Any]]:
    """Name, purpose, whether it can run here, and what is missing if not."""
    from deltatune.multi.operators.choice import DENSE, EVEN, FUSED, GATHER, NATIVE, SEGMENT

    missing = {
        NATIVE: "" if NATIVE.is_available() else "not compiled",
        FUSED: "no GPU" if not torch.cuda.is_available() else "" if FUSED.is_available() else "no triton",
    }
    return [
        {
            "name": type(operator).__name__.lower(),
            "about": _about(operator),
            "available": not missing.get(operator),
            "missing": missing.get(operator, ""),
        }
        for operator in (DENSE, GATHER, NATIVE, SEGMENT, EVEN, FUSED)
    ]


def _about(operator: object) -> str:
    """The first sentence of its module, without its name in front."""
    told = inspect.cleandoc(inspect.getdoc(inspect.getmodule(type(operator))) or "").split("\n\n")[0].replace("\n", " ").partition(": ")[2]
    return told[:1].upper() + told[1:]
