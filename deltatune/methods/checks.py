"""Range checks of method fields, with one way of saying what is wrong."""

from __future__ import annotations

from typing import Any

from deltatune.errors import InvalidValue


def positive(method: Any, *fields: str) -> None:
    """Every field is greater than 0.

    Raises:
        InvalidValue: one is not.
    """
    for field in fields:
        value = getattr(method, field)
        if not value > 0:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be greater than 0.")


def fraction(method: Any, *fields: str) -> None:
    """Every field lies in [0, 1).

    Raises:
        InvalidValue: one does not.
    """
    for field in fields:
        value = getattr(method, field)
        if not 0 <= value < 1:
            raise InvalidValue(f"{type(method).__name__}({field}={value!r}) was asked for; `{field}` must be at least 0 and less than 1.")


def share(method: Any, *fields: str) -> None:
    """Every field lies in (0, 1].

    Raises:
        InvalidValue: one does not.
    """
    for field in fields:
        value = getattr(method, field)
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
