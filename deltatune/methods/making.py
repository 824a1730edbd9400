"""From a name and loose settings to a method: the one door for a command line, a file or a form.

A recipe's type hints say how a text is read. Nothing here knows a method by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deltatune.annotations import convert
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
        return convert(value, field.hint)
    except (ValueError, TypeError):
        raise InvalidValue(
            f"{recipe.__name__}({field.name}={value!r}) was asked for; `{field.name}` takes {in_words(field.hint)}, "
            f"such as {field.example}."
        ) from None
