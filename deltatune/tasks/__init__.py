"""Tasks by name: what a dataset asks, where its rows lie, how it is put to a model and how it is scored."""

from __future__ import annotations

from deltatune.tasks.loading import TaskData as TaskData
from deltatune.tasks.loading import fingerprint as fingerprint
from deltatune.tasks.loading import load_task as load_task
from deltatune.tasks.rows import Rows as Rows
from deltatune.tasks.task import Task as Task
from deltatune.tasks.task import get_task as get_task
from deltatune.tasks.task import tasks as tasks
from deltatune.tasks.template import Template as Template
from deltatune.tasks.template import Verbalizer as Verbalizer

__all__ = ["Rows", "Task", "TaskData", "Template", "Verbalizer", "fingerprint", "get_task", "load_task", "tasks"]
