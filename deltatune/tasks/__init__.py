"""Tasks by name: what a dataset asks, where its rows lie, how it is put to a model and how it is scored."""

from __future__ import annotations

from deltatune.tasks.files import task_from_file as task_from_file
from deltatune.tasks.loading import TaskData as TaskData
from deltatune.tasks.loading import fingerprint as fingerprint
from deltatune.tasks.loading import load_task as load_task
from deltatune.tasks.metrics import compute as compute
from deltatune.tasks.metrics import metrics as metrics
from deltatune.tasks.rows import Rows as Rows
from deltatune.tasks.sampling import fewer as fewer
from deltatune.tasks.sampling import k_shot as k_shot
from deltatune.tasks.sampling import subset as subset
from deltatune.tasks.task import Task as Task
from deltatune.tasks.task import get_task as get_task
from deltatune.tasks.task import tasks as tasks
from deltatune.tasks.template import Template as Template
from deltatune.tasks.template import Verbalizer as Verbalizer

__all__ = [
    "Rows",
    "Task",
    "TaskData",
    "Template",
    "Verbalizer",
    "compute",
    "fewer",
    "fingerprint",
    "get_task",
    "k_shot",
    "load_task",
    "metrics",
    "subset",
    "task_from_file",
    "tasks",
]
