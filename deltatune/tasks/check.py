"""Check task files (``python -m deltatune.tasks.check FILE...``): all that a built-in task has to have, and its rows if they are here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from deltatune.errors import DeltaError, nearest
from deltatune.tasks.loading import TaskData, load_task
from deltatune.tasks.metrics import metrics
from deltatune.tasks.schema import CATEGORIES
from deltatune.tasks.sources import mirror_index
from deltatune.tasks.task import Task, mirror_root, read_task

COMPLETE = ("description", "category", "metrics", "templates", "licence", "citation")


def faults(task: Task) -> Iterator[str]:
    """What a task lacks to be a built-in one; the schema alone asks for less, as a user's own task needs less."""
    for entry in COMPLETE:
        if not getattr(task, entry):
            yield f"`{entry}` is missing"
    if task.category not in CATEGORIES:
        yield f"the category `{task.category}` is not known. {nearest(task.category, CATEGORIES)}"
    if not (task.hub or task.mirror or task.packaged):
        yield "no source: give it `hub`, `mirror` or `packaged`"
    if task.hub and task.mirror:
        yield "both `hub` and `mirror`: the latter is for rows that are on no hub"
    for name in task.metrics:
        if name not in metrics:
            yield f"the metric `{name}` is not known. {nearest(name, metrics)}"
        elif task.kind.answers not in metrics[name].of:
            fitting = [other for other in metrics if task.kind.answers in metrics[other].of]
            yield f"the metric `{name}` does not fit a {task.type} task. Those that do: {', '.join(fitting)}"


def index_faults(task: Task) -> Iterator[str]:
    """Where a task contradicts what the mirror's index says of its folder."""
    root = mirror_root()
    index = mirror_index(root) if root else {}
    paths = task.hub.paths if task.hub else (task.mirror,)
    record = next((index[path] for path in paths if path in index), None)
    if record is None or task.packaged is not None:
        return
    names = record["label_names"] or (record["token_tags"] or {}).get("names") or []
    if names and set(names) != set(task.labels) and not (task.hub and task.hub.labels):
        yield f"its labels are not those of the index: {sorted(set(names) ^ set(task.labels))}"
    if unlike := [name for name in record["metrics"] if name not in task.metrics]:
        yield f"the index has the metrics {', '.join(unlike)} too"
    if record["metrics"][0] != task.metric:
        yield f"the customary metric is {record['metrics'][0]}"
    if record["category"] != task.category:
        yield f"its category is {record['category']}"
    if record["language"] != task.language:
        yield f"its language is {record['language']}"


def shown(data: TaskData, rows: int = 1) -> Iterator[str]:
    """Rendered prompts and answers of the first rows, template by template."""
    task = data.task
    for number, template in enumerate(task.templates):
        for row in data.train[:rows]:
            yield f"--- template {number}\n{template.render(row)} [[{task.kind.spoken.say(task, template, row)}]]"


def main(files: Sequence[str]) -> int:
    """Check each file; how many have a fault."""
    wrong = 0
    for name in files:
        try:
            task = read_task(Path(name))
            found = [*faults(task), *index_faults(task)]
            data = load_task(task) if task.is_runnable and not found else None
            print(*(shown(data) if data else ()), sep="\n")
        except DeltaError as cause:
            found = [str(cause)]
        print(f"{Path(name).name}: {'; '.join(found) or 'ok'}")
        wrong += bool(found)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
