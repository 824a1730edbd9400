"""The entries of a ``run.yaml``: which there are, and what each may hold, looked at before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.errors import InvalidValue, UnknownName, nearest


@dataclass(frozen=True)
class Kind:
    """What an entry may hold.

    Attributes:
        said: in words.
        fits: whether a value is of the kind.
    """

    said: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_recipe(value: Any) -> bool:
    return _is_text(value) or (_is_mapping(value) and _is_text(value.get("name", "?")))


def _one_or_more(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(fits, value)) and bool(value) if isinstance(value, list) else fits(value)


TEXT = Kind("a text", _is_text)
TEXTS = Kind("a text, or a list of texts", _one_or_more(_is_text))
MAPPING = Kind("names with values", _is_mapping)
NUMBER = Kind("a whole number", _is_number)
METHODS = Kind("a method's name, or its `name` and fields, or a list of these", _one_or_more(_is_recipe))
LAYERS = Kind("a number, a list of numbers, or a text such as top:3", lambda value: _is_text(value) or _one_or_more(_is_number)(value))

DATA = {"path": TEXT, "text": TEXTS, "label": TEXT, "type": TEXT}
RUN = {
    "backbone": TEXT,
    "task": TEXT,
    "data": MAPPING,
    "method": METHODS,
    "where": TEXTS,
    "layers": LAYERS,
    "settings": MAPPING,
    "fingerprint": Kind("a text", lambda value: isinstance(value, str)),
    "versions": MAPPING,
}


def checked(entries: Mapping[Any, Any], kinds: Mapping[str, Kind], place: str) -> dict[str, Any]:
    """The entries that are not left empty.

    Args:
        entries: as YAML gives them.
        kinds: what there may be.
        place: where they stand, for errors.

    Raises:
        UnknownName: an entry of another name.
        InvalidValue: one of another kind.
    """
    for name, value in entries.items():
        if name not in kinds:
            raise UnknownName(f"{place} has the entry `{name}`, which does not belong there. {nearest(str(name), kinds)}")
        if value is not None and not kinds[name].fits(value):
            raise InvalidValue(f"{place} has {value!r} for `{name}`; it has to be {kinds[name].said}.")
    return {name: value for name, value in entries.items() if value is not None}
