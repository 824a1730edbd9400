"""Mixture: rows of several tasks, each answered as its own task is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltatune.errors import DataError, nearest
from deltatune.tasks.rows import Row
from deltatune.tasks.types.base import Asking, Spoken, TaskType, task_types

if TYPE_CHECKING:
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

PART, ROW = "part", "row"
"""The columns: the number of the part, and its row."""


class AsItsPart(Spoken):
    """Each row is answered as its own task is, by its task's first template."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """What the part says."""
        part = task.parts[row[PART]]
        return part.kind.spoken.say(part, part.templates[0], row[ROW])

    def understand(self, task: Task, template: Template, row: Row, text: str) -> Any:
        """What the part understands."""
        part = task.parts[row[PART]]
        return part.kind.spoken.understand(part, part.templates[0], row[ROW], text)


class OneOfThem(Asking):
    """The name of a task, and what that task asks for."""

    def width(self, task: Task) -> None:
        """Tasks have as many texts as they have."""

    def given(self, task: Task, parts: Sequence[str]) -> Row:
        """The name of the task, then its texts."""
        return {PART: _number(task, parts[0]), ROW: _part(task, parts[0]).kind.asking.given(_part(task, parts[0]), parts[1:])}

    def asked(self, task: Task, row: Row) -> Row:
        """The columns of the task that ``task`` names."""
        name = str(row.get("task", ""))
        return {PART: _number(task, name), ROW: _part(task, name).kind.asking.asked(_part(task, name), row)}


class Mixture(TaskType):
    """A value is that of the row's own task."""

    name = "mixture"
    asks = "several"
    answers = "mixed"
    metrics = ("mean",)
    fields = {}  # noqa: RUF012
    headless = "mixes tasks whose answers differ"
    spoken = AsItsPart()
    asking = OneOfThem()
    words = "mixture"

    def columns(self, task: Task) -> tuple[str, ...]:
        """Part and row."""
        return PART, ROW

    def inputs(self, task: Task) -> tuple[str, ...]:
        """Part and row."""
        return PART, ROW

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """Rows come encoded by their own tasks."""
        return row

    def reference(self, task: Task, row: Row) -> Any:
        """That of the row's own task."""
        part = task.parts[row[PART]]
        return part.kind.reference(part, row[ROW])

    def perfect(self, task: Task, row: Row) -> Any:
        """That of the row's own task."""
        part = task.parts[row[PART]]
        return part.kind.perfect(part, row[ROW])

    def constant(self, task: Task, rows: Sequence[Row]) -> Any:
        """None is common to several tasks."""
        return None

    def named(self, task: Task, row: Row, value: Any) -> Any:
        """As the row's own task has it."""
        part = task.parts[row[PART]]
        return part.kind.named(part, row[ROW], value)


def _number(task: Task, name: str) -> int:
    names = [part.name for part in task.parts]
    if name not in names:
        raise DataError(f"`{task.name}` mixes {', '.join(names)}; `{name}` is none of them. Say which is asked. {nearest(name, names)}")
    return names.index(name)


def _part(task: Task, name: str) -> Task:
    return task.parts[_number(task, name)]


task_types.register("mixture")(Mixture())
