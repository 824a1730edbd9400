"""From a name and loose settings to a method: the one door for a command line, a file or a form.

A recipe's type hints say how a text is read. Nothing here knows a method by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from deltatune.errors import InvalidValue, UnknownName, nearest
from deltatune.methods.fields import REQUIRED, MethodField, fields_of, in_words
from deltatune.methods.kinds import Method, methods


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method called ``name`` with these settings; texts are read as the fields' types.

    >>> make("lora", {"rank": "4", "rank_stabilized": "yes"})
    LoRA(rank=4, alpha=16.0, dropout=0.0, rank_stabilized=True, ranks=(), init='kaiming')

    Raises:
        UnknownName: no method, or none of its fields, has such a name; the nearest are named.
        InvalidValue: a value of another type or out of its range, or a field without a default left out.
    """
    import deltatune.methods  # noqa: F401 - registers the built-in ones

    recipe = methods[name]
    known = {field.name: field for field in fields_of(recipe)}
    values = {}
    for key, value in (settings or {}).items():
        if key not in known:
            hint = nearest(key, known) if known else "It has none."
            raise UnknownName(f"{recipe.__name__} has no field called `{key}`. {hint} `deltatune methods show {name}` explains them.")
        values[key] = _read(recipe, known[key], value)
    for field in known.values():
        if field.default is REQUIRED and field.name not in values:
            raise InvalidValue(
                f"{recipe.__name__} needs a value for `{field.name}`: {in_words(field.hint)}. Set it, as in {field.example}."
            )
    return recipe(**values)


def pairs(settings: Sequence[str]) -> dict[str, str]:
    """``["rank=8", "alpha=16"]`` as names and values.

    Raises:
        InvalidValue: an entry without ``=``, or a name given twice.
    """
    found: dict[str, str] = {}
    for entry in settings:
        written, equals, value = entry.partition("=")
        name = written.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidValue(f"`{entry}` sets nothing. Write FIELD=VALUE, such as rank=8.")
        if name in found:
            raise InvalidValue(f"`{name}` is set twice, to `{found[name]}` and to `{value.strip()}`. Keep one of them.")
        found[name] = value.strip()
    return found


def settings_of(method: Method) -> dict[str, Any]:
    """The value of every field, from which ``make`` builds an equal method."""
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


def _read(recipe: type[Method], field: MethodField, value: Any) -> Any:
    """``value`` as the field's type."""
    try:
        return _convert(value, field.hint)
    except (ValueError, TypeError):
        raise InvalidValue(
            f"{recipe.__name__}({field.name}={value!r}) was asked for; `{field.name}` takes {in_words(field.hint)}, "
            f"such as {field.example}."
        ) from None


def _convert(value: Any, hint: Any) -> Any:
    """``value``, or what it says as a text, as an annotated type.

    Raises:
        ValueError: it is not of that type.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first(value, options)
    if origin is Literal:
        return _READERS[type(options[0])](value) if str(value) in map(str, options) else _convert(value, None)
    if origin is tuple:
        return _tuple(value, options)
    if hint not in _READERS:
        raise ValueError(value)
    return _READERS[hint](value)


def _first(value: Any, options: tuple[Any, ...]) -> Any:
    """``value`` as the first type that it fits: ``None`` is tried first, and ``str``, which fits every text, last."""
    for option in sorted(options, key=lambda option: (option is str, option is not NoneType)):
        try:
            return _convert(value, option)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _tuple(value: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        bare = value.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
        value = [part.strip().strip("'\"") for part in _COMMAS.split(bare) if part.strip()]
    parts = list(value) if isinstance(value, Sequence) else [value]
    hints = [options[0]] * len(parts) if options[-1] is Ellipsis else list(options)
    return tuple(_convert(_inner(part, hint), hint) for part, hint in zip(parts, hints, strict=True))


def _inner(part: Any, hint: Any) -> Any:
    """A tuple within a tuple is written with colons, the last ones counting: ``attention.query:4``."""
    within = get_origin(hint) is tuple and isinstance(part, str)
    return part.rsplit(":", len(get_args(hint)) - 1) if within else part


def _integer(value: Any) -> int:
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or int(number) != number:
        raise ValueError(value)
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(value)
    return words[value.lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _nothing(value: Any) -> None:
    if value is not None and str(value).lower() not in ("none", "null", ""):
        raise ValueError(value)


_COMMAS = re.compile(r",(?![^{]*\})")
"""Commas outside braces, which belong to a pattern such as ``attention.{query,value}``."""

_READERS: dict[Any, Callable[[Any], Any]] = {int: _integer, float: _number, bool: _truth, str: _text, NoneType: _nothing}
