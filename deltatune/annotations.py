"""Annotated types at run time: whether a value is of one, and what a text says as one.

Methods' fields, delta files, settings and command lines all go by the annotations of dataclasses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: no text for a number, no truth for a whole number.

    >>> fits(8, int), fits(True, int), fits("8", int), fits((1, 2), tuple[int, ...]), fits(8, float)
    (True, False, False, True, True)
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple):
            return False
        if origin is tuple and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(inner, args[0]) for inner in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(inner, args[1]) for inner in value.values())
    if hint in (int, float):
        return isinstance(value, hint | int) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def convert(value: Any, hint: Any) -> Any:
    """``value``, or what it says as a text, as an annotated type.

    >>> convert("4", int), convert("yes", bool), convert("none", float | None), convert("1,2", tuple[int, ...])
    (4, True, None, (1, 2))

    Raises:
        ValueError: it is not of that type.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first(value, options)
    if origin is Literal:
        return _READERS[type(options[0])](value) if str(value) in map(str, options) else convert(value, None)
    if origin is tuple:
        return _tuple(value, options)
    if hint not in _READERS:
        raise ValueError(value)
    return _READERS[hint](value)


def _first(value: Any, options: tuple[Any, ...]) -> Any:
    """``value`` as the first type that it fits: ``None`` is tried first, and ``str``, which fits every text, last."""
    for option in sorted(options, key=lambda option: (option is str, option is not NoneType)):
        try:
            return convert(value, option)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _tuple(value: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        bare = value.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
        value = [part.strip().strip("'\"") for part in _COMMAS.split(bare) if part.strip()]
    parts = list(value) if isinstance(value, Sequence) else [value]
    hints = [options[0]] * len(parts) if options[-1] is Ellipsis else list(options)
    return tuple(convert(_inner(part, hint), hint) for part, hint in zip(parts, hints, strict=True))


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
