"""The tables of a store. What they once were, and how one becomes the next, lies in ``migrations/versions``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Double, ForeignKey, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
"""Of constraints, so that migrations can name them in every database."""

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
"""States of a trial."""

INTERRUPTED = "interrupted"
"""State of an attempt whose driver or worker died."""


def now() -> datetime:
    """The moment, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Every table."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {dict[str, Any]: JSON, datetime: DateTime(timezone=True), float: Double}  # noqa: RUF012 - SQLAlchemy's form


class StudyRow(Base):
    """A study: its design, and what it is for."""

    __tablename__ = "study"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    experiment: Mapped[str] = mapped_column(String(100))
    profile: Mapped[str] = mapped_column(String(20))
    design: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class TrialRow(Base):
    """A trial: what is asked, and once it is done what came of it."""

    __tablename__ = "trial"
    __table_args__ = (UniqueConstraint("study_id", "key"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(32))
    position: Mapped[int]
    purpose: Mapped[str] = mapped_column(String(20))
    procedure: Mapped[str] = mapped_column(String(100))
    backbone: Mapped[str] = mapped_column(Text)
    task: Mapped[str] = mapped_column(Text)
    category: Mapped[str] = mapped_column(String(100))
    method: Mapped[str] = mapped_column(String(200))
    seed: Mapped[int] = mapped_column(BigInteger)
    cell: Mapped[dict[str, Any]]
    asked: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(20), default=WAITING, index=True)
    metric: Mapped[str | None] = mapped_column(String(100))
    score: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    degenerate: Mapped[bool | None]
    lr: Mapped[float | None]
    trained: Mapped[int | None] = mapped_column(BigInteger)
    total: Mapped[int | None] = mapped_column(BigInteger)
    steps: Mapped[int | None] = mapped_column(BigInteger)
    tokens: Mapped[int | None] = mapped_column(BigInteger)
    seconds: Mapped[float | None]
    training_seconds: Mapped[float | None]
    seconds_per_step: Mapped[float | None]
    peak_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    delta_bytes: Mapped[int | None] = mapped_column(BigInteger)
    numbers: Mapped[dict[str, Any] | None]


class AttemptRow(Base):
    """One start of a trial: when, where, on what, and how it ended."""

    __tablename__ = "attempt"
    __table_args__ = (UniqueConstraint("trial_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trial.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(20), default=RUNNING)
    began: Mapped[datetime] = mapped_column(default=now)
    ended: Mapped[datetime | None]
    surroundings_id: Mapped[int] = mapped_column(ForeignKey("surroundings.id"))
    error: Mapped[str | None] = mapped_column(String(200))
    message: Mapped[str | None] = mapped_column(Text)
    traceback: Mapped[str | None] = mapped_column(Text)


class PointRow(Base):
    """One point of a learning curve."""

    __tablename__ = "point"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trial.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(20), primary_key=True)
    value: Mapped[float]


class SurroundingsRow(Base):
    """A machine with its software, once for all attempts made on it."""

    __tablename__ = "surroundings"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    machine: Mapped[dict[str, Any]]
    versions: Mapped[dict[str, Any]]
