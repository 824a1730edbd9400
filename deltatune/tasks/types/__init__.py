"""The kinds of answers a task can ask for; one file each."""

from __future__ import annotations

from deltatune.tasks.types.base import Asking as Asking
from deltatune.tasks.types.base import Head as Head
from deltatune.tasks.types.base import Spoken as Spoken
from deltatune.tasks.types.base import TaskType as TaskType
from deltatune.tasks.types.base import task_types as task_types

__all__ = ["Asking", "Head", "Spoken", "TaskType", "task_types"]
