"""What a recipe says about itself: its fields, its formula, its summary, all read from its dataclass and its docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deltatune.methods.kinds import Method, methods

REQUIRED: Any = dataclasses.MISSING
"""The default of a field that has none."""

_SECTIONS = ("Args", "Attributes", "Raises", "Example", "Examples", "Returns", "Class attributes")

_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}

_SAMPLES: dict[Any, str] = {int: "8", float: "0.1", bool: "true", str: "text"}


@dataclass(frozen=True)
class MethodField:
    """One field of a recipe.

    Attributes:
        name: as in ``--set name=value``.
        hint: its annotation.
        default: what it is when left out; ``REQUIRED`` if it may not be.
        meaning: what the docstring says about it.
    """

    name: str
    hint: Any
    default: Any
    meaning: str = ""

    @property
    def type_name(self) -> str:
        """The annotation as one writes it: ``int``, ``tuple[int, ...]``, ``str | None``."""
        return self.hint.__name__ if isinstance(self.hint, type) and not get_args(self.hint) else str(self.hint).replace("typing.", "")

    @property
    def default_text(self) -> str:
        """The default as one writes it on the command line; empty where there is none to write."""
        if self.default is REQUIRED or self.default is None:
            return ""
        return as_written(self.default)

    @property
    def example(self) -> str:
        """A setting the field takes: ``rank=8``."""
        options = (self.hint, *get_args(self.hint))
        if options[-1] is Ellipsis and get_origin(options[1]) is tuple:
            return f"{self.name}={self.default_text or _joined(options[1])}"
        sample = next((_SAMPLES[option] for option in options if option in _SAMPLES), "...")
        return f"{self.name}={self.default_text or sample}"


def as_written(value: Any) -> str:
    """A value as one writes it on the command line, or reads it in a sentence.

    >>> [as_written(value) for value in (16.0, 1e-05, True, None, (1, 2), (("attention.*", 8),))]
    ['16', '1e-05', 'true', 'none', '1,2', 'attention.*:8']
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        return ",".join(":".join(map(as_written, one)) if isinstance(one, list | tuple) else as_written(one) for one in value)
    return str(value)


def in_short(name: str, values: Mapping[str, Any]) -> str:
    """A method as one asks for it: fields at their defaults are left out, and all are shown of a method nobody registered.

    Of long lists it shows the beginning.

    >>> in_short("lora", {"rank": 4, "alpha": 16.0, "ranks": []})
    'lora rank=4'
    >>> in_short("trainable-tokens", {"token_ids": range(1000, 1100)})
    'trainable-tokens token_ids=1000,1001,1002,1003,... (100)'
    """
    defaults = {field.name: field.default for field in fields_of(methods[name])} if name in methods else {}
    usual = {field: as_written(default) for field, default in defaults.items()}
    told = {field: as_written(value) for field, value in values.items()}
    return " ".join([name, *(f"{field}={_begun(values[field])}" for field, said in told.items() if said != usual.get(field))])


def _begun(value: Any) -> str:
    """As one writes it; of more than a dozen entries the first few, and how many there are."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) <= 12:
        return as_written(value)
    return f"{as_written(tuple(value[:4]))},... ({len(value)})"


def fields_of(recipe: type[Method]) -> tuple[MethodField, ...]:
    """The fields of a recipe in order, with what its docstring says about each."""
    hints, meanings = get_type_hints(recipe), meanings_of(recipe)
    return tuple(
        MethodField(field.name, hints[field.name], _default(field), meanings.get(field.name, "")) for field in dataclasses.fields(recipe)
    )


def summary_of(recipe: type[Method]) -> str:
    """One line about a recipe: what its module's docstring says behind the name; else the first line of its own.

    >>> from deltatune.methods import LoRA
    >>> summary_of(LoRA)
    'A low-rank change of a linear map (Hu et al. 2021)'
    """
    written = inspect.getdoc(sys.modules[recipe.__module__]) or inspect.getdoc(recipe) or ""
    line = " ".join(written.split("\n\n")[0].split()).removesuffix(".")
    name, colon, rest = line.partition(": ")
    said = rest if colon and len(name) < 30 else line
    return said[:1].upper() + said[1:]


def formula_of(recipe: type[Method]) -> str:
    """What a recipe's docstring says ahead of its sections: the formula, and what is trained."""
    return _sections(recipe)[""].strip()


def meanings_of(documented: type, section: str = "Args") -> dict[str, str]:
    """Name -> what a section of a class's Google-style docstring says about it."""
    meanings: dict[str, str] = {}
    name = ""
    for line in _sections(documented).get(section, "").splitlines():
        if line and not line.startswith(" "):
            name, _, text = line.partition(":")
            meanings[name] = text.strip()
        elif name and line.strip():
            meanings[name] += f" {line.strip()}"
    return meanings


def in_words(hint: Any) -> str:
    """An annotation in words.

    >>> in_words(tuple[int, ...]), in_words(float | None)
    ('whole numbers with commas between them', 'a number or none')
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(option) for option in options)
    if origin is Literal:
        return "one of " + ", ".join(f"`{option}`" for option in options)
    if origin is tuple and len(options) == 2 and options[1] is Ellipsis:
        if get_origin(options[0]) is tuple:
            return f"entries such as {_joined(options[0])} with commas between them"
        return f"{in_words(options[0]).removeprefix('a ')}s with commas between them"
    if origin is tuple:
        return f"{len(options)} values with commas between them"
    return _WORDS.get(hint, str(hint))


def _joined(hint: Any) -> str:
    """A sample of a tuple within a tuple: ``text:8``."""
    return ":".join(_SAMPLES.get(option, "...") for option in get_args(hint))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _sections(documented: type) -> dict[str, str]:
    """The sections of a Google-style docstring by title; what stands ahead of them has the title ``""``."""
    sections: dict[str, list[str]] = {"": []}
    title = ""
    for line in (inspect.getdoc(documented) or "").splitlines():
        if line.removesuffix(":") in _SECTIONS and line.endswith(":"):
            title = line[:-1]
        sections.setdefault(title, []).append("" if line == f"{title}:" else line)
    return {title: textwrap.dedent("\n".join(lines)) for title, lines in sections.items()}
