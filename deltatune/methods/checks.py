"""Checks of method fields, with one way of saying what is wrong."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, get_type_hints

from deltatune.annotations import fits
from deltatune.errors import InvalidValue
from deltatune.methods.fields import in_words
from deltatune.methods.kinds import Method


def check_types(method: Method) -> None:
    """Every field is of its annotated type; a list does for a tuple.

    Raises:
        InvalidValue: one is not.
    """
    for name, hint in _hints(type(method)).items():
        value = getattr(method, name)
        if not fits(tuple(value) if isinstance(value, list | range) else value, hint):
            raise InvalidValue(f"{type(method).__name__}({name}={value!r}) was asked for; `{name}` takes {in_words(hint)}.")


def positive(method: Any, *fields: str) -> None:
    """Every field is greater than 0.

    Raises:
        InvalidValue: one is not.
    """
    for field in fields:
        value = number(method, field)
        if not value > 0:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be greater than 0.")


def not_negative(method: Any, *fields: str) -> None:
    """Every field is at least 0.

    Raises:
        InvalidValue: one is not.
    """
    for field in fields:
        value = number(method, field)
        if not value >= 0:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be at least 0.")


def fraction(method: Any, *fields: str) -> None:
    """Every field lies in [0, 1).

    Raises:
        InvalidValue: one does not.
    """
    for field in fields:
        value = number(method, field)
        if not 0 <= value < 1:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be at least 0 and less than 1.")


def proportion(method: Any, *fields: str) -> None:
    """Every field lies in (0, 1].

    Raises:
        InvalidValue: one does not.
    """
    for field in fields:
        value = number(method, field)
        if not 0 < value <= 1:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be greater than 0 and at most 1.")


def one_of(method: Any, field: str, choices: tuple[str, ...]) -> None:
    """The field is one of the choices.

    Raises:
        InvalidValue: it is not.
    """
    value = getattr(method, field)
    if value not in choices:
        shown = ", ".join(f"`{choice}`" for choice in choices)
        raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` is one of {shown}.")


def number(method: Any, field: str) -> float:
    """The field's value.

    Raises:
        InvalidValue: it is no number.
    """
    value = getattr(method, field)
    if not fits(value, float):
        raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` takes a number.")
    return value  # type: ignore[no-any-return]


@cache
def _hints(recipe: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(recipe)
    return {field.name: hints[field.name] for field in dataclasses.fields(recipe)}
