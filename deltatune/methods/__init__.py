"""WHAT is attached: one file, one paper, one frozen dataclass, found here by its name.

The methods themselves are loaded when the first of them is asked for, so that ``import deltatune`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltatune.methods.kinds import Method as Method
from deltatune.methods.kinds import methods as methods

if TYPE_CHECKING:
    from deltatune.methods.builtin import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # what Python itself asks modules for
        raise AttributeError(name)
    try:
        return vars(import_module("deltatune.methods.builtin"))[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *vars(import_module("deltatune.methods.builtin"))})
