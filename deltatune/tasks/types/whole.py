"""Types whose rows are learnt as wholes: plain texts, and chats of which the assistant's turns are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltatune.errors import DataError
from deltatune.tasks.rows import Row
from deltatune.tasks.types.base import Asking, Spoken, TaskType, task_types

if TYPE_CHECKING:
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"


class Continued(Spoken):
    """What the model writes behind a text."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """The row itself."""
        return str(row[task.label])

    def understand(self, task: Task, template: Template, row: Row, text: str) -> str:
        """What was written."""
        return text


class Plain(TaskType):
    """Rows are texts; a value is (sum of the log-probabilities, tokens)."""

    name = "plain"
    asks = "each word"
    answers = "likelihood"
    metrics = ("log_likelihood", "perplexity")
    fields = {}  # noqa: RUF012
    spoken: Spoken = Continued()
    words = "plain"
    headless = "is learnt token by token"

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """The text."""
        return {task.label: str(row[task.label])}

    def perfect(self, task: Task, row: Row) -> Any:
        """Certain of every token."""
        return (0.0, 1)

    def constant(self, task: Task, rows: Sequence[Row]) -> Any:
        """Certain of nothing."""
        return (float("-inf"), 1)


class Turns(Asking):
    """A message of the user, or the turns so far."""

    def given(self, task: Task, parts: Sequence[str]) -> Row:
        """One turn of the user."""
        if len(parts) != 1:
            raise DataError(f"`{task.name}` takes one message of the user a row; {len(parts)} texts were given.")
        return {task.label: [{"role": "user", "content": str(parts[0])}]}

    def asked(self, task: Task, row: Row) -> Row:
        """The turns so far."""
        return {task.label: turns_of(task, row.get(task.label))}


class Conversation(Plain):
    """Rows are lists of ``{role, content}``; the assistant's turns are what is learnt."""

    name = "conversation"
    asks = "each reply"
    words = "chat"
    asking = Turns()

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """The turns, of which one at least is the assistant's."""
        turns = turns_of(task, row[task.label])
        if all(turn["role"] != ASSISTANT for turn in turns):
            raise DataError(
                f"A chat of `{task.name}` has no turn of the assistant, so nothing could be learnt: {str(turns)[:80]} ... Take it out."
            )
        return {task.label: turns}


def turns_of(task: Task, value: Any) -> list[dict[str, str]]:
    """The turns of a chat.

    Raises:
        DataError: it is no list of roles with contents.
    """
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value):
        raise DataError(
            f"A row of `{task.name}` has no chat in `{task.label}`: it has to be a list of {{role, content}}, and is {str(value)[:80]!r}."
        )
    for turn in value:
        if turn["role"] not in ROLES or not isinstance(turn["content"], str):
            raise DataError(f"A chat of `{task.name}` has the turn {str(turn)[:80]}; roles are {', '.join(ROLES)}, contents are texts.")
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in value]


task_types.register("plain")(Plain())
task_types.register("conversation")(Conversation())
