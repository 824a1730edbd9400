"""The errors of deltatune. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltaError(Exception):
    """Root of every error deltatune raises on purpose; the command line shows it without a traceback."""


class Noticed(UserWarning):
    """Something a person should hear of, that stops nothing; the command line says it in a sentence."""


class UnknownName(DeltaError):
    """A method, field, backbone, task, delta or role that nobody registered."""


class InvalidValue(DeltaError):
    """A known field or argument with a value it cannot take."""


class Halt(Exception):
    """Raised from outside into whatever runs, as a time limit is; nobody takes it for an error of what it met."""


class NoSite(DeltaError):
    """An entry of ``where`` that hits nothing in this backbone."""


class Unsupported(DeltaError):
    """A combination deltatune refuses because it would be wrong or silently do nothing."""


class Idle(DeltaError):
    """A patch whose host module was never called: it would train nothing and change nothing."""


class Busy(DeltaError):
    """Two threads run one backbone at a time while its weights are swapped or a route is open."""


class CheckpointError(DeltaError):
    """A delta file that is missing, truncated, edited, or does not fit."""


class ForeignBackbone(CheckpointError):
    """A delta file that was trained on another backbone."""


class Diverged(DeltaError):
    """A training whose numbers are no longer finite."""


class DataError(DeltaError):
    """A dataset or a row that the task cannot use."""


class OutputError(DeltaError):
    """A folder or file that cannot be written, or would be overwritten."""


class MissingExtra(DeltaError):
    """An optional dependency that is not installed."""


def near(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that resemble ``name``, the nearest first.

    >>> near("lroa", ["lora", "bitfit"]), near("xyz", ["lora", "bitfit"])
    (['lora'], [])
    """
    lowered = {option.lower(): option for option in sorted(set(known))}
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=0.5)]


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The known names nearest to ``name``, as the sentence that goes into an error.

    >>> nearest("lroa", ["lora", "bitfit"])
    'Did you mean `lora`?'
    >>> nearest("BitFit", ["lora", "bitfit"])
    'Did you mean `bitfit`?'
    >>> nearest("xyz", ["lora", "bitfit"])
    'Known: `bitfit`, `lora`.'
    """
    options = sorted(set(known))
    if close := near(name, options, most):
        return "Did you mean " + " or ".join(f"`{option}`" for option in close) + "?"
    shown = ", ".join(f"`{option}`" for option in options[:12])
    return f"Known: {shown}{', ...' if len(options) > 12 else ''}."


def missing_extra(module: str, extra: str) -> DeltaError:
    """The error for an import of ``module`` that failed: it names the extra to install."""
    return MissingExtra(f"This needs the package `{module}`, which is not installed. Install the extra: pip install 'deltatune[{extra}]'.")
