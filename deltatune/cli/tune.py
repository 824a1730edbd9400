"""``deltatune tune``: the main job. The command reads options into a ``Run``; ``training`` does it."""

from __future__ import annotations

import os
import re
import shlex
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.dry import dry
from deltatune.cli.jobs import tune_together
from deltatune.cli.knobs import with_settings
from deltatune.cli.places import Layers, Where, layers_of, where_of
from deltatune.cli.terminal import facts, note, share, show, show_command, show_json, size
from deltatune.errors import DeltaError, InvalidValue
from deltatune.methods.fields import in_short
from deltatune.methods.kinds import Method, methods
from deltatune.methods.making import make, pairs, settings_of

if TYPE_CHECKING:
    from deltatune.training.result import Result
    from deltatune.training.run import DataFile, Run

WHAT = "What to train on what"
DATA = "Your own data"
OUTPUT = "Output"

Jobs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A jobs.yaml: many deltas, trained together; other options change all.", rich_help_panel=WHAT),
]
LabelType = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="What the label is: classification, regression, generation, ...; left out, it is seen from the columns.",
        rich_help_panel=DATA,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the memory and the time that a step would take; train and write nothing.", rich_help_panel=OUTPUT
    ),
]


@commands.register("tune")
@with_settings
def tune(
    *,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Alias, installed package, folder, or hub id; see deltatune backbones.", rich_help_panel=WHAT),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A task by name, or several with commas between; see deltatune tasks.", rich_help_panel=WHAT),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="A method by name; see deltatune methods.", rich_help_panel=WHAT)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method; repeat it.", rich_help_panel=WHAT)
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="A run.yaml to do again; other options change it.", rich_help_panel=WHAT)
    ] = None,
    jobs: Jobs = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="A CSV, JSONL or Parquet file.", rich_help_panel=DATA)] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="The text column; twice for pairs. Left out: text.", rich_help_panel=DATA)
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The label column. Left out: label.", rich_help_panel=DATA)] = None,
    type_: LabelType = None,
    where: Where = None,
    layers: Layers = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder. Left out: a new one in runs/.", rich_help_panel=OUTPUT)
    ] = None,
    dry_run: DryRun = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in that folder.", rich_help_panel=OUTPUT)] = False,
    json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.", rich_help_panel=OUTPUT)] = False,
    settings: dict[str, Any],
) -> None:
    """Train a delta on a task, score it on the test rows, and save it.

    The folder gets the delta, metrics.json, a picture of the learning curve, and run.yaml, which --config does again.
    A run that was interrupted goes on when the same is asked for again.

    deltatune tune --backbone minilm --task bbc-news --method lora --set rank=4
    deltatune tune --backbone smollm2-135m --task tweet-sentiment --method ia3
    deltatune tune --backbone minilm --method bitfit --data mail.csv --label box
    deltatune tune --config runs/bbc/run.yaml --seed 1 --out runs/bbc-seed-1
    deltatune tune --backbone smollm2-135m --task tweet-sentiment --method lora --batch-size 64 --dry-run
    deltatune tune --jobs jobs.yaml --out runs/sweep
    """
    if jobs is not None:
        single = {
            "--task": task,
            "--method": method,
            "--set": set_,
            "--config": config,
            "--data": data,
            "--where": where,
            "--layers": layers,
            "--dry-run": dry_run,
        }
        tune_together(jobs, backbone, out, settings, overwrite=overwrite, json=json, other=single)
        return
    from deltatune.training.run import read_run

    own = _own_data(data, task, text, label, type_)
    run = _run(read_run(config) if config else None, backbone, own or task, method, pairs(set_ or []), settings)
    run = _placed(run, where, layers)
    if dry_run:
        dry(run, json=json)
    else:
        _train(run, out or free_folder(run), overwrite=overwrite, json=json)


def _train(run: Run, folder: Path, *, overwrite: bool, json: bool) -> None:
    """The run, with what is said ahead of it and behind."""
    from deltatune.training.place import is_main
    from deltatune.training.train import replay

    if is_main():
        note(f"Loading `{run.backbone}` and `{_task(run)}`, to train {_said(run)} into `{folder}`.")
    try:
        result = replay(run, out=folder, overwrite=overwrite)
    except (KeyboardInterrupt, DeltaError):
        _tell_what_stays(folder)
        raise
    if not is_main():
        return
    if json:
        show_json(result.to_json(), one_line=True)
    else:
        show_result(run, result)


def _tell_what_stays(folder: Path) -> None:
    from deltatune.training.replaced import REPLACED

    if any(folder.glob("checkpoints/checkpoint-*/complete.json")):
        note(f"The same command with `--out {folder}` goes on from the last checkpoint.")
    if (folder / REPLACED).is_dir():
        note(f"The run that was there before is in `{folder / REPLACED}` until this one is finished.")


def _own_data(data: str | None, task: str | None, text: list[str] | None, label: str | None, type_: str | None) -> DataFile | None:
    from deltatune.training.run import DataFile

    if data is None:
        given = {"--text": text, "--label": label, "--type": type_}
        for name, value in given.items():
            if value:
                raise InvalidValue(
                    f"`{name}` describes a file of your own, but there is no `--data`. Add --data FILE, or leave `{name}` out."
                )
        return None
    if task is not None:
        raise InvalidValue(f"Both `--task {task}` and `--data {data}` were given. A run has one of them.")
    columns = text or ["text"]
    return DataFile(data, columns[0] if len(columns) == 1 else tuple(columns), label or "label", type_)


def _run(
    before: Run | None,
    backbone: str | None,
    task: str | DataFile | None,
    method: str | None,
    fields: dict[str, str],
    settings: dict[str, Any],
) -> Run:
    """What the options ask for, on top of a configuration if there is one."""
    from deltatune.training.run import Run
    from deltatune.training.settings import Settings

    name = backbone or (before.backbone if before else None)
    asked = task or (before.task if before else None)
    recipes = _recipes(before, method, fields)
    if name is None or asked is None or not recipes:
        lacking = [flag for flag, value in (("--backbone", name), ("--task", asked), ("--method", recipes)) if not value]
        raise InvalidValue(
            f"`tune` needs {' and '.join(f'`{flag}`' for flag in lacking)}. For example: "
            "`deltatune tune --backbone minilm --task bbc-news --method lora`. "
            "`deltatune backbones`, `tasks` and `methods` list the names."
        )
    return Run(
        backbone=name,
        task=asked,
        methods=recipes,
        where=before.where if before else None,
        layers=before.layers if before else None,
        settings=Settings.of((before.settings.to_dict() if before else {}) | settings),
        fingerprint=before.fingerprint if before and task is None else "",
    )


def _recipes(before: Run | None, method: str | None, fields: dict[str, str]) -> tuple[Method, ...]:
    if method is not None:
        return (make(method, fields),)
    if before is None or not fields:
        return before.methods if before else ()
    if len(before.methods) > 1:
        raise InvalidValue("`--set` does not say which of the configuration's methods it means. Edit the file instead.")
    [recipe] = before.methods
    return (make(methods.name_of(type(recipe)), settings_of(recipe) | fields),)


def _placed(run: Run, where: list[str] | None, layers: str | None) -> Run:
    from dataclasses import replace

    return replace(run, where=where_of(where) or run.where, layers=run.layers if layers is None else layers_of(layers))


def _said(run: Run) -> str:
    return " and ".join(f"`{in_short(methods.name_of(type(method)), settings_of(method))}`" for method in run.methods)


def _task(run: Run) -> str:
    return run.task if isinstance(run.task, str) else Path(run.task.path).stem


def free_folder(run: Run) -> Path:
    """The first of ``runs/<task>-<method>-<backbone>``, ``...-2``, ``...-3`` that is not there yet.

    Raises:
        InvalidValue: one of several processes asks, who might not agree.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidValue("Several processes train together, and each would choose a folder. Name one: --out DIR.")
    words = [_task(run), *(methods.name_of(type(method)) for method in run.methods), Path(run.backbone).name]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-.")
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(folder for folder in (Path("runs") / name for name in names) if not folder.exists())


def show_result(run: Run, result: Result) -> None:
    """The end of a run, for people."""
    others = [f"{name} {value:.4f}" for name, value in result.metrics.items() if name != result.metric]
    course = [
        (
            "time",
            f"{result.seconds:.1f} s, evaluations included; {result.steps} steps, the median one {1000 * result.seconds_per_step:.0f} ms",
        ),
        ("peak memory", size(result.peak_memory_bytes)),
    ]
    if result.degenerate:
        note("The model says the same to every test row: it has learnt nothing that tells them apart.")
    show(
        "",
        facts(
            ("test score", Text.assemble((f"{result.score:.4f}", "bold green"), f" {result.metric}", *(f", {other}" for other in others))),
            (
                "trained",
                f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters "
                f"({share(result.trainable_parameters, result.total_parameters)})",
            ),
            *(course if result.steps else []),
            ("delta", f"{size(result.delta_bytes)} in {result.out}"),
        ),
        "",
    )
    show_command(f'deltatune predict {shlex.quote(str(result.out))} "..."')
