"""Where a store is: a file of SQLite, or a database by its URL."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from deltatune.errors import missing_extra

VARIABLE = "DELTATUNE_STORE"
DEFAULT = Path("runs") / "studies.db"


def url_of(place: str | os.PathLike[str] | None) -> str:
    """The URL of a store; a path is a file of SQLite, nothing is ``$DELTATUNE_STORE`` or ``runs/studies.db``.

    >>> url_of("mine.db"), url_of("postgresql://host/studies")
    ('sqlite:///mine.db', 'postgresql+psycopg://host/studies')

    Raises:
        MissingExtra: PostgreSQL's driver is not installed.
    """
    named = str(place or os.environ.get(VARIABLE) or DEFAULT)
    if "://" not in named:
        return f"sqlite:///{Path(named).expanduser()}"
    for scheme in ("postgresql://", "postgres://"):
        if named.startswith(scheme):
            _check_driver()
            return "postgresql+psycopg://" + named.removeprefix(scheme)
    return named


def _check_driver() -> None:
    try:
        import_module("psycopg")
    except ImportError as cause:
        raise missing_extra("psycopg", "study") from cause
