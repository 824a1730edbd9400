"""``Store``: the one door to the database. Each method is one transaction, so a kill leaves either all of it or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, delete, event, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from deltatune.errors import InvalidValue, OutputError
from deltatune.study.design import Study, study_from_dict
from deltatune.study.record import Record
from deltatune.study.store.hold import held
from deltatune.study.store.migrations import upgrade
from deltatune.study.store.place import url_of
from deltatune.study.store.rows import new_row, record_of, study_row, trial_row, trials_of
from deltatune.study.store.schema import DONE, FAILED, RUNNING, WAITING, AttemptRow, PointRow, StudyRow, SurroundingsRow, TrialRow
from deltatune.study.store.writer import Writer
from deltatune.study.trial import Trial, trial_from_dict


class Store:
    """Studies, trials, attempts and curves in a database.

    Args:
        place: a URL, or the path of a file of SQLite; ``$DELTATUNE_STORE`` or ``runs/studies.db`` if left out.

    Raises:
        OutputError: the database cannot be opened.
        MissingExtra: its driver is not installed.
    """

    def __init__(self, place: str | os.PathLike[str] | None = None) -> None:
        self.url = url_of(place)
        self.engine = _engine(self.url)
        with self._opened(), self.engine.begin() as connection:
            upgrade(connection)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        try:
            if self.engine.url.database and self.engine.dialect.name == "sqlite":
                Path(self.engine.url.database).parent.mkdir(parents=True, exist_ok=True)
            yield
        except (SQLAlchemyError, OSError) as cause:
            shown = self.engine.url.render_as_string(hide_password=True)
            reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
            raise OutputError(f"The store `{shown}` cannot be opened: {reason}. Name another one with --store, or mend it.") from cause

    def _session(self) -> Session:
        return Session(self.engine, expire_on_commit=False)

    def names(self) -> list[str]:
        """Of all studies."""
        with self._session() as session:
            return list(session.scalars(select(StudyRow.name).order_by(StudyRow.name)))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def add(self, study: Study, *, change: bool = False) -> None:
        """Enter a study; one that is there is left as it is, or takes the new design and keeps the trials they share.

        Raises:
            InvalidValue: a study of that name is there, with another design.
        """
        trials, design = list(study.trials()), json.loads(json.dumps(study.to_dict(), default=str))
        with self._session() as session, session.begin():
            row = session.scalar(select(StudyRow).where(StudyRow.name == study.name))
            if row is None:
                row = StudyRow(name=study.name, experiment=study.experiment, profile=study.profile, design=design)
                session.add(row)
                session.flush()
            elif row.design == design:
                return
            elif not change:
                raise InvalidValue(_differs(study.name, row.design, design))
            row.design, row.experiment, row.profile = design, study.experiment, study.profile
            there = {one.key: one for one in session.scalars(select(TrialRow).where(TrialRow.study_id == row.id))}
            wanted = {trial.key for trial in trials}
            for key in {key for key, one in there.items() if one.purpose == "trial"} - wanted:
                session.delete(there[key])
            for position, trial in enumerate(trials):
                if trial.key in there:
                    there[trial.key].position, there[trial.key].method = position, trial.label
                else:
                    session.add(new_row(row.id, position, trial))

    def study(self, name: str) -> Study:
        """The design of a study.

        Raises:
            UnknownName: there is none of that name.
        """
        with self._session() as session:
            return study_from_dict(study_row(session, name).design, f"The study `{name}` in the store")

    def remove(self, name: str) -> None:
        """A study with all that belongs to it.

        Raises:
            UnknownName: there is none of that name.
            Busy: it is being run.
        """
        with self.writer(name), self._session() as session, session.begin():
            number = study_row(session, name).id
            trials = select(TrialRow.id).where(TrialRow.study_id == number)
            for table in (PointRow, AttemptRow):
                session.execute(delete(table).where(table.trial_id.in_(trials)))
            session.execute(delete(TrialRow).where(TrialRow.study_id == number))
            session.execute(delete(StudyRow).where(StudyRow.id == number))

    @contextmanager
    def writer(self, name: str) -> Iterator[Writer]:
        """Be the one who writes what becomes of a study, for a block.

        Raises:
            UnknownName: there is none of that name.
            Busy: another process does.
        """
        with self._session() as session:
            number = study_row(session, name).id
        with held(self.engine, number, name):
            yield Writer(self._session, name)

    def counts(self, name: str) -> dict[str, int]:
        """Trials by state."""
        with self._session() as session:
            number = study_row(session, name).id
            grouped = select(TrialRow.state, func.count()).where(TrialRow.study_id == number).group_by(TrialRow.state)
            found: dict[str, int] = {state: count for state, count in session.execute(grouped).all()}
            return {state: found.get(state, 0) for state in (DONE, RUNNING, WAITING, FAILED)}

    def records(self, name: str) -> list[Record]:
        """Every trial of a study, in order."""
        with self._session() as session:
            rows = list(session.scalars(trials_of(session, name).order_by(TrialRow.position)))
            attempts: dict[int, list[AttemptRow]] = {}
            for attempt in session.scalars(
                select(AttemptRow).join(TrialRow).where(TrialRow.study_id == study_row(session, name).id).order_by(AttemptRow.number)
            ):
                attempts.setdefault(attempt.trial_id, []).append(attempt)
            return [record_of(row, attempts.get(row.id, [])) for row in rows]

    def attempts(self, name: str, key: str) -> list[AttemptRow]:
        """Every start of a trial, in order."""
        with self._session() as session:
            row = trial_row(session, name, key)
            return list(session.scalars(select(AttemptRow).where(AttemptRow.trial_id == row.id).order_by(AttemptRow.number)))

    def curve(self, name: str, key: str) -> list[dict[str, Any]]:
        """The learning curve of a trial, as a Trainer logs it."""
        with self._session() as session:
            row = trial_row(session, name, key)
            found = session.scalars(select(PointRow).where(PointRow.trial_id == row.id).order_by(PointRow.step, PointRow.name))
            return [{"step": one.step, one.name: one.value} for one in found]

    def searched(self, name: str) -> list[tuple[Trial, list[dict[str, Any]] | None]]:
        """The search trials that are over, each with its curve; None for those that failed."""
        with self._session() as session:
            over = trials_of(session, name).where(TrialRow.purpose == "search", TrialRow.state.in_((DONE, FAILED)))
            rows = list(session.scalars(over.order_by(TrialRow.position)))
        return [(trial_from_dict(row.asked), self.curve(name, row.key) if row.state == DONE else None) for row in rows]

    def places(self, name: str) -> list[SurroundingsRow]:
        """The machines and versions that a study's attempts were made on."""
        with self._session() as session:
            number = study_row(session, name).id
            used = select(AttemptRow.surroundings_id).join(TrialRow).where(TrialRow.study_id == number)
            return list(session.scalars(select(SurroundingsRow).where(SurroundingsRow.id.in_(used)).order_by(SurroundingsRow.id)))


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _prepare(connection: Any, record: Any) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=60000", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


def _differs(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    fields = [field for field in new.keys() | old.keys() if old.get(field) != new.get(field)]
    return (
        f"The study `{name}` is in the store with another design: {', '.join(f'`{field}`' for field in sorted(fields))} differ. "
        "Give this one another name, or let it take the new design with --change; trials that both have are kept."
    )
