"""Generation: a free text, maybe with further ones that are as right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.types.base import Spoken, TaskType, answered, task_types

if TYPE_CHECKING:
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template


class FreeText(Spoken):
    """The text itself."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """The label's text."""
        return str(row[task.label]).strip()

    def understand(self, task: Task, template: Template, row: Row, text: str) -> str:
        """What was written."""
        return text.strip()


class Generation(TaskType):
    """A value is a text; a reference is one, or a list of them."""

    name = "generation"
    asks = "a text"
    answers = "text"
    metrics = ("exact_match",)
    fields = {"references": False}  # noqa: RUF012
    spoken = FreeText()

    def read(self, task: Task) -> tuple[str, ...]:
        """Texts, label, and the further right answers where there are any."""
        return (*task.text, task.label, *((task.references,) if task.references else ()))

    def columns(self, task: Task) -> tuple[str, ...]:
        """As they are read."""
        return tuple(dict.fromkeys(self.read(task)))

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the text, and the further right ones as a list."""
        whole = {**answered(task, row, text_of(row[task.label]))}
        if task.references and task.references != task.label:
            whole[task.references] = [str(one) for one in row[task.references]]
        return whole

    def reference(self, task: Task, row: Row) -> Any:
        """The list of right answers where the task has one, else the text."""
        return list(row[task.references]) or [row[task.label]] if task.references else row[task.label]

    def perfect(self, task: Task, row: Row) -> Any:
        """The label's text, or the first right answer where that is not among them."""
        right = self.reference(task, row)
        return row[task.label] if isinstance(right, str) or row[task.label] in right else right[0]

    def constant(self, task: Task, rows: Sequence[Row]) -> str:
        """The commonest text, the first in the alphabet of several."""
        counts = Counter(str(row[task.label]) for row in rows)
        return min(counts, key=lambda text: (-counts[text], text))


for _name in ("generation", "text2text"):  # the second is its former name, which delta files may hold
    task_types.register(_name)(Generation())
