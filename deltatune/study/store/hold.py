"""One driver a study: a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sqlalchemy import Engine, text

from deltatune.errors import Busy

SPACE = 0x64656C74
"""First half of our advisory locks in PostgreSQL: the letters ``delt``."""


@contextmanager
def held(engine: Engine, number: int, name: str) -> Iterator[None]:
    """Hold a study for the block.

    Args:
        engine: of the store.
        number: of the study there.
        name: of the study, for the error.

    Raises:
        Busy: another driver holds it.
    """
    hold = _held_on_server if engine.dialect.name == "postgresql" else _held_by_file
    with hold(engine, number) as free:
        if not free:
            raise Busy(
                f"The study `{name}` is being run by another process. Wait for it, or stop it; `deltatune study status {name}` looks on."
            )
        yield


@contextmanager
def _held_on_server(engine: Engine, number: int) -> Iterator[bool]:
    """PostgreSQL lets go of it when the connection ends."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        values = {"space": SPACE, "number": number}
        free = bool(connection.execute(text("SELECT pg_try_advisory_lock(:space, :number)"), values).scalar())
        try:
            yield free
        finally:
            if free:
                connection.execute(text("SELECT pg_advisory_unlock(:space, :number)"), values)


@contextmanager
def _held_by_file(engine: Engine, number: int) -> Iterator[bool]:
    """The system lets go of it when the process ends. A database in memory is nobody else's."""
    if not engine.url.database or engine.dialect.name != "sqlite":
        yield True
        return
    with Path(f"{engine.url.database}.{number}.lock").open("w") as file:
        yield _lock(file)


def _lock(file: IO[str]) -> bool:
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
