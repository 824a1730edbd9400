"""One option for each field of ``training.settings.Settings``: its help, default and type are the dataclass's own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape

from deltatune.methods.fields import meanings_of
from deltatune.training.settings import Settings

PANELS: dict[str, tuple[str, ...]] = {
    "Scoring and stopping": ("early_stopping", "evaluations", "eval_rows", "eval_batch_size", "test_rows", "save_steps"),
    "Memory and speed": ("bf16", "gradient_checkpointing", "recompute", "keep_frozen", "quantize", "max_length", "streaming"),
    "How the task is put": (
        "framing",
        "template",
        "manual_template",
        "packing",
        "temperature",
        "shots",
        "shots_seed",
        "train_rows",
        "new_head",
        "class_weights",
    ),
}
"""Where the help shows them; what is not listed is ``Training``."""

CHOICES = {"framing": "auto|head|text2text|cloze", "quantize": "int8|nf4", "keep_frozen": "memory|disk"}
"""What the help shows for fields with few values; the dataclass checks them."""

TOLD = {
    "report_to": "Experiment trackers of transformers, such as tensorboard, whose package you install; commas between several.",
    "seed": "Of the head's and the patches' first weights, of dropout and of the order of rows.",
    "weight_decay": "Weight decay of AdamW.",
}
"""Help where the docstring says it for readers of Python, or needs its name beside it."""

ALONE = {"--early-stopping": "2"}
"""What an option stands for when no value follows it."""


def completed(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the value of an option that was given without one.

    >>> completed(["tune", "--early-stopping", "--seed", "1"])
    ['tune', '--early-stopping', '2', '--seed', '1']
    """
    found: list[str] = []
    for word, following in zip_longest(words, words[1:], fillvalue="-"):
        found.append(word)
        if word in ALONE and following.startswith("-"):
            found.append(ALONE[word])
    return found


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting; what was given arrives as its keyword ``settings``, by name."""
    hints = get_type_hints(Settings)
    options = [_option(field.name, hints[field.name]) for field in dataclasses.fields(Settings)]
    return with_options(command, "settings", options, lambda given: {name: value for name, value in given.items() if value is not None})


def with_options(
    command: Callable[..., None], keyword: str, options: Sequence[inspect.Parameter], made: Callable[[dict[str, Any]], Any]
) -> Callable[..., None]:
    """Give a command more options, whose values arrive together.

    Args:
        command: the command.
        keyword: its parameter for them.
        options: the options, as keyword-only parameters.
        made: their values by name -> the value of ``keyword``.
    """
    own = [parameter for name, parameter in inspect.signature(command, eval_str=True).parameters.items() if name != keyword]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {option.name: values.pop(option.name) for option in options}
        command(**values, **{keyword: made(given)})

    parameters = [*own, *options]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, hint: Any) -> inspect.Parameter:
    """The option for one setting; None stands for what was not given."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    kind = kinds[0] if kinds[0] in (int, float, bool) else str
    default = getattr(Settings, name)
    shown = isinstance(default, int | float) and not isinstance(default, bool)
    panel = next((title for title, names in PANELS.items() if name in names), "Training")
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        flag,
        help=told(TOLD.get(name) or meanings_of(Settings, "Attributes").get(name, ""))
        + (f" [dim]Default {default:g}.[/]" if shown else ""),
        metavar=CHOICES.get(name),
        show_default=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def told(text: str) -> str:
    """A docstring's words as help: code set off, ``None`` as what one does on a command line, a capital in front."""
    words = re.sub(r"\bNone\b", "left out, it", text)
    parts = re.split("`+", words[:1].upper() + words[1:])
    return "".join(f"[cyan]{_named(part)}[/]" if position % 2 else escape(part) for position, part in enumerate(parts))


def _named(code: str) -> str:
    """A setting as the option it is; anything else as it stands."""
    return f"--{code.replace('_', '-')}" if code in Settings.__dataclass_fields__ else escape(code)
