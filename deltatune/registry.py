"""Names and what they stand for: one implementation for methods, architectures, backbones, tasks and commands.

Built-in entries and third-party ones come through the same door: ``register``, called directly or through an
entry point of the group ``deltatune.<plural>``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from deltatune.errors import InvalidValue, Noticed, UnknownName, Unsupported, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind.

    Args:
        noun: what an entry is called.
        plural: names the group of entry points, ``deltatune.<plural>``.
        builtin: a module whose import registers the entries of the package, at the first look-up.

    >>> colours = Registry[str]("colour", "colours")
    >>> _ = colours.register("red")("#f00")
    >>> colours["red"]
    '#f00'
    >>> colours["rde"]
    Traceback (most recent call last):
    deltatune.errors.UnknownName: No colour is called `rde`. Did you mean `red`?
    """

    def __init__(self, noun: str, plural: str, builtin: str | None = None) -> None:
        self.noun = noun
        self.group = f"deltatune.{plural}"
        self._builtin = builtin
        self._entries: dict[str, T] = {}
        self._plugins_read = False
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters its argument under ``name``; a name is given once.

        Raises:
            InvalidValue: the name is taken by something else.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise InvalidValue(f"The {self.noun} `{name}` is registered already, as {self._entries[name]!r}. Choose another name.")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        entries = self._read()
        if name in self._broken:
            raise Unsupported(f"The {self.noun} {self._broken[name]} Repair or uninstall its package.")
        if name not in entries:
            raise UnknownName(f"No {self.noun} is called `{name}`. {nearest(name, entries)}")
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._read()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._read()))

    def __len__(self) -> int:
        return len(self._read())

    def name_of(self, entry: T) -> str:
        """The name under which ``entry`` is registered.

        Raises:
            UnknownName: it is not registered.
        """
        for name, known in self._read().items():
            if known is entry:
                return name
        raise UnknownName(f"{entry!r} is not a registered {self.noun}. Register it first.")

    def _read(self) -> dict[str, T]:
        """The table, plug-ins included; they load at the first look-up, not at import. One that cannot be loaded is told of."""
        if not self._plugins_read:
            self._plugins_read = True  # a plug-in may look things up itself
            if self._builtin is not None:
                import_module(self._builtin)
            for plugin in entry_points(group=self.group):
                try:
                    plugin.load()
                except Exception as cause:
                    self._broken[plugin.name] = f"`{plugin.name}` ({plugin.value}) could not be loaded: {cause!r}."
                    warnings.warn(f"The {self.noun} {self._broken[plugin.name]} The others can be used.", Noticed, stacklevel=4)
        return self._entries
