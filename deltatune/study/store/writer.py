"""``Writer``: who holds a study writes what becomes of its trials; each method is one transaction."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from deltatune.study.store.rows import new_row, rate_of, study_row, trial_row, trials_of
from deltatune.study.store.schema import DONE, FAILED, INTERRUPTED, RUNNING, WAITING, AttemptRow, PointRow, SurroundingsRow, TrialRow, now
from deltatune.study.surroundings import Surroundings, surroundings
from deltatune.study.trial import Failure, Outcome, Trial, trial_from_dict

COLUMNS = ("metric", "score", "degenerate", "steps", "tokens", "seconds_per_step", "peak_memory_bytes", "delta_bytes")
"""Of an outcome's numbers, those with a column of their own name."""

RENAMED = {"trainable_parameters": "trained", "total_parameters": "total", "seconds": "training_seconds"}
"""Those whose column has another name."""


class Writer:
    """Writes what becomes of one study's trials; ``Store.writer`` makes it, and sees to it that there is one.

    Args:
        session: gives a new session.
        name: of the study.
    """

    def __init__(self, session: Callable[[], Session], name: str) -> None:
        self._session = session
        self.name = name

    def recover(self) -> list[str]:
        """Keys of the trials that were running when their driver died; they wait again."""
        with self._session() as session, session.begin():
            rows = list(session.scalars(trials_of(session, self.name).where(TrialRow.state == RUNNING)))
            for row in rows:
                row.state = WAITING
                for attempt in session.scalars(select(AttemptRow).where(AttemptRow.trial_id == row.id, AttemptRow.state == RUNNING)):
                    attempt.state, attempt.ended = INTERRUPTED, now()
            return [row.key for row in rows]

    def again(self) -> int:
        """Let what failed wait once more; how many there are."""
        with self._session() as session, session.begin():
            rows = list(session.scalars(trials_of(session, self.name).where(TrialRow.state == FAILED)))
            for row in rows:
                row.state = WAITING
            return len(rows)

    def waiting(self) -> list[Trial]:
        """The trials that are still to be done, in order."""
        with self._session() as session:
            rows = session.scalars(trials_of(session, self.name).where(TrialRow.state == WAITING).order_by(TrialRow.position))
            return [trial_from_dict(row.asked) for row in rows]

    def enter(self, trial: Trial) -> None:
        """A trial that the design did not have, behind all others."""
        with self._session() as session, session.begin():
            study = study_row(session, self.name).id
            last = session.scalar(select(func.max(TrialRow.position)).where(TrialRow.study_id == study)) or 0
            session.add(new_row(study, last + 1, trial))

    def start(self, trial: Trial) -> int:
        """A trial begins; returns the number of the attempt. It is said to be here until its outcome says where it was."""
        with self._session() as session, session.begin():
            row = trial_row(session, self.name, trial.key)
            row.state, row.lr = RUNNING, rate_of(trial)
            before = session.scalar(select(func.count()).select_from(AttemptRow).where(AttemptRow.trial_id == row.id)) or 0
            session.add(AttemptRow(trial_id=row.id, number=before + 1, surroundings_id=_place(session, surroundings())))
            return before + 1

    def finish(self, outcome: Outcome) -> None:
        """A trial is done: its numbers, its curve and the end of its attempt."""
        numbers = _plain(outcome.numbers)
        with self._session() as session, session.begin():
            row = trial_row(session, self.name, outcome.key)
            for entry in COLUMNS:
                setattr(row, entry, numbers.pop(entry, None))
            for entry, column in RENAMED.items():
                setattr(row, column, numbers.pop(entry, None))
            row.low, row.high = (numbers.get("intervals") or {}).get(row.metric or "", (None, None))
            row.seconds, row.numbers, row.state = outcome.seconds, numbers, DONE
            session.execute(delete(PointRow).where(PointRow.trial_id == row.id))
            session.add_all(PointRow(trial_id=row.id, step=step, name=what, value=value) for step, what, value in points(outcome.history))
            _end(session, row, DONE, place=outcome.place)

    def fail(self, failure: Failure, *, again: bool) -> None:
        """An attempt came to nothing; the trial waits for another one, or has failed."""
        with self._session() as session, session.begin():
            row = trial_row(session, self.name, failure.key)
            row.state = WAITING if again else FAILED
            _end(session, row, FAILED, failure)

    def drop(self, keys: Iterable[str]) -> None:
        """The keyboard stopped these trials: they wait, and their attempts were interrupted."""
        with self._session() as session, session.begin():
            for key in keys:
                row = trial_row(session, self.name, key)
                row.state = WAITING
                _end(session, row, INTERRUPTED)


def points(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of what was logged, each once; what is not finite is left out."""
    found = {
        (int(entry["step"]), name): float(entry[name])
        for entry in history
        for name in ("loss", "eval_score")
        if name in entry and math.isfinite(float(entry[name]))
    }
    return ((step, name, value) for (step, name), value in found.items())


def _place(session: Session, found: Surroundings) -> int:
    """The number of a machine with its software, entered if it is new."""
    digest = hashlib.sha256(json.dumps([found.machine, found.versions], sort_keys=True).encode()).hexdigest()
    row = session.scalar(select(SurroundingsRow).where(SurroundingsRow.digest == digest))
    if row is None:
        row = SurroundingsRow(digest=digest, machine=dict(found.machine), versions=dict(found.versions))
        session.add(row)
        session.flush()
    return row.id


def _end(session: Session, row: TrialRow, state: str, failure: Failure | None = None, place: Surroundings | None = None) -> None:
    told: dict[str, Any] = {"error": failure.kind[:200], "message": failure.message, "traceback": failure.traceback} if failure else {}
    if place is not None:
        told["surroundings_id"] = _place(session, place)
    session.execute(
        update(AttemptRow).where(AttemptRow.trial_id == row.id, AttemptRow.state == RUNNING).values(state=state, ended=now(), **told)
    )


def _plain(value: Any) -> Any:
    """The same as every database takes it: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
