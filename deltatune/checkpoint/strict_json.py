"""JSON as files should hold it: no key twice, nothing that JSON has not, and neither numbers nor nesting beyond all sense."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""How deep objects and lists may lie in one another: whoever walks them does so by recursion."""

MAX_WHOLE = 2**64
"""Whole numbers are smaller than this, so that each of them is a float as well."""


def parse(content: bytes, *, constants: bool = False) -> Any:
    """What a JSON text says.

    Args:
        content: the text.
        constants: take NaN and Infinity, which Python writes and JSON has not, and floats that overflow to it.

    Raises:
        ValueError: it is no JSON, goes beyond the bounds, or has a key twice in one object, of which readers would take either.
        RecursionError: it is nested beyond what the parser takes.

    >>> parse(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    data = json.loads(
        content,
        parse_int=_whole,
        parse_constant=None if constants else _refuse,
        parse_float=None if constants else _finite,
        object_pairs_hook=_unique,
    )
    level, depth = [data], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        level = [inner for value in level for inner in _inside(value)]
        depth += 1
    return data


def _inside(value: Any) -> Any:
    """What lies directly in an object or a list."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(number: str) -> int:
    value = int(number)
    if abs(value) >= MAX_WHOLE:
        raise ValueError(f"{number[:40]} is beyond 64 bits")
    return value


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is beyond all floats")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return data
