"""Alembic's migrations of the store's tables: ``versions`` holds one file a change, oldest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from deltatune.study.store.schema import Base


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the tables behind a connection to a revision, the newest if left out; from nothing, too."""
    config = Config()
    scripts = ScriptDirectory(str(Path(__file__).parent))

    def steps(current: Any, context: Any) -> Any:
        return scripts._upgrade_revs(revision, current)

    with EnvironmentContext(config, scripts, fn=steps, destination_rev=revision) as surroundings:
        surroundings.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
        with surroundings.begin_transaction():
            surroundings.run_migrations()
