"""``deltatune study``: run a grid of trials that survives any kill, look on, and report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.knobs import with_options
from deltatune.cli.terminal import Json, note, plural, quoted, show, show_command, show_json, table
from deltatune.errors import InvalidValue, UnknownName, Unsupported, missing_extra, nearest

if TYPE_CHECKING:
    from deltatune.study.design import Study
    from deltatune.study.record import Record
    from deltatune.study.runner.runner import Runner
    from deltatune.study.shows import Show
    from deltatune.study.store.store import Store

Place = Annotated[
    str | None,
    typer.Option("--store", metavar="PLACE", help="A file of SQLite, or a database's URL. Left out: $DELTATUNE_STORE, or runs/studies.db."),
]
Name = Annotated[str, typer.Argument(help="A study in the store; `deltatune study list` names them.")]
Profiles = Annotated[
    str, typer.Option("--profile", metavar="quick|full", help="Of an experiment: quick tries the machinery, full gives verdicts.")
]


@dataclass(frozen=True)
class Conduct:
    """How trials are carried out: the options that ``run`` and ``resume`` share."""

    runner: Annotated[str, typer.Option(metavar="local|ray", help="Where trials run: in this process, or on Ray.")] = "local"
    fuse: Annotated[bool, typer.Option("--fuse", help="Train trials of one backbone together, in shared forwards.")] = False
    again: Annotated[bool, typer.Option("--again", help="Try failed trials once more.")] = False
    store: Place = None
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where running trials lie. Left out: studies/NAME beside the store, or below runs/.")
    ] = None
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --runner ray: a cluster. Left out: one on this machine.")
    ] = None
    workers: Annotated[int | None, typer.Option(help="With --runner ray: most trials at the same time. Left out: as many as fit.")] = None
    cpus: Annotated[float | None, typer.Option(help="With --runner ray: cores of a trial. Left out: all, shared by the workers.")] = None
    gpus: Annotated[float | None, typer.Option(help="With --runner ray: GPUs of a trial. Left out: all, shared by the workers.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each event, instead of bars.")] = False


def with_conduct(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``Conduct``, which arrives as its keyword ``how``."""
    hints = get_type_hints(Conduct, include_extras=True)
    options = [Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name]) for one in fields(Conduct)]
    return with_options(command, "how", options, lambda given: Conduct(**given))


COLOURS = {"holds": "green", "does not hold": "red", "undecided": "dim"}

study = typer.Typer(help="Run a grid of trials, look on, compare, and report.", no_args_is_help=True, rich_markup_mode="rich")
commands.register("study")(study)


@study.command("run", no_args_is_help=True)
@with_conduct
def run(
    what: Annotated[str, typer.Argument(help="A study.yaml, or the name of a built-in experiment, such as performance.")],
    profile: Profiles = "quick",
    name: Annotated[str | None, typer.Option(help="Another name for the study.")] = None,
    change: Annotated[bool, typer.Option("--change", help="Let a study in the store take this design; shared trials are kept.")] = False,
    *,
    how: Conduct,
) -> None:
    """Run a study, or go on with it: what is done already is not done again.

    deltatune study run study.yaml
    deltatune study run performance --profile quick
    """
    opened = _open(how.store)
    asked = _asked(what, profile, name)
    opened.add(asked, change=change)
    _conduct(opened, asked.name, how)


@study.command("resume", no_args_is_help=True)
@with_conduct
def resume(name: Name, *, how: Conduct) -> None:
    """Go on with a study of the store."""
    _conduct(_open(how.store), name, how)


@study.command("status", no_args_is_help=True)
def status(name: Name, store: Place = None, json: Json = False) -> None:
    """How far a study is, what failed and why."""
    opened = _open(store)
    counts, records = opened.counts(name), opened.records(name)
    if json:
        show_json({"study": name, **counts, "trials": [_plain(record) for record in records]})
        return
    drawn = table("method", "done", "running", "waiting", "failed", right=("done", "running", "waiting", "failed"), whole=("method",))
    for method in dict.fromkeys(record.method for record in records):
        own = [record.state for record in records if record.method == method]
        cells = [str(own.count(state)) if own.count(state) else "-" for state in ("done", "running", "waiting", "failed")]
        drawn.add_row(Text(method, style="cyan"), *cells)
    show(Text.assemble((name, "bold"), f": {counts['done']} of {plural(sum(counts.values()), 'trial')} done"), drawn)
    for record in records:
        if record.error:
            said = f"{record.method} on {record.task}, seed {record.seed}, {plural(record.attempts, 'attempt')}"
            show(Text.assemble(("✗ ", "red"), said, (f"  {record.error}", "red")))
    if counts["done"] < sum(counts.values()):
        show_command(f"deltatune study resume {name}{' --again' if counts['failed'] else ''}")


@study.command("list")
def listing(store: Place = None, json: Json = False) -> None:
    """The studies in the store."""
    opened = _open(store)
    found = [(opened.study(name), opened.counts(name)) for name in opened.names()]
    if json:
        show_json([{"name": one.name, "experiment": one.experiment, "profile": one.profile, **counts} for one, counts in found])
        return
    drawn = table("study", "experiment", "profile", "done", "trials", "failed", right=("done", "trials", "failed"), whole=("study",))
    for one, counts in found:
        numbers = (str(counts["done"]), str(sum(counts.values())), str(counts["failed"] or "-"))
        drawn.add_row(Text(one.name, style="cyan"), one.experiment, one.profile, *numbers)
    show(drawn if found else quoted("The store is empty: `deltatune study run FILE` begins a study."))


@study.command("rm", no_args_is_help=True)
def remove(name: Name, store: Place = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove a study with all its results."""
    opened = _open(store)
    counts = opened.counts(name)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidValue(f"`{name}` has {plural(counts['done'], 'result')}. Say that they may go: --yes.")
        typer.confirm(f"Remove {name} with {plural(counts['done'], 'result')}?", abort=True)
    opened.remove(name)
    note(f"`{name}` is removed.")


@study.command("report", no_args_is_help=True)
def report(
    name: Name,
    store: Place = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Left out: reports/NAME beside the store, or below runs/.")] = None,
    json: Json = False,
) -> None:
    """Write what a study found: report.html, report.md with its pictures, results.csv, and study.yaml, which does it again.

    `deltatune study import DIR` takes such a folder into another store, where the study can go on.
    """
    from deltatune.study.report.folder import write_report

    opened = _open(store)
    found, files = write_report(opened, name, out or _beside(opened) / "reports" / name)
    verdicts = [{"claim": claim.number, "says": claim.says, **vars(told)} for claim, told in found.verdicts]
    if json:
        show_json({"study": name, "files": [str(file) for file in files], "verdicts": verdicts})
        return
    drawn = table("claim", "says", "verdict", whole=("claim", "verdict"))
    for one in verdicts:
        drawn.add_row(one["claim"], one["says"], Text(one["verdict"], style=COLOURS[one["verdict"]]))
    show(*([drawn] if verdicts else []), f"Written: {', '.join(str(file) for file in files)}")


@study.command("import", no_args_is_help=True)
def take(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `deltatune study report` wrote, here or on another machine.")],
    change: Annotated[bool, typer.Option("--change", help="Let a study in the store take this design; shared trials are kept.")] = False,
    store: Place = None,
    json: Json = False,
) -> None:
    """Take a report's results into the store: what was done elsewhere is done here, and the study can go on."""
    opened = _open(store)
    from deltatune.study.exchange import take_results

    taken = take_results(opened, folder, change=change)
    if json:
        show_json(vars(taken))
        return
    note(f"{taken.study}: {plural(taken.taken, 'trial')} taken, {taken.known} were done here already.")
    if taken.strange:
        note(f"{plural(taken.strange, 'result')} of the folder belong to no trial of its design and were left out.")
    show_command(f"deltatune study status {taken.study}")


@study.command("compare", no_args_is_help=True)
def compare(
    name: Name,
    methods: Annotated[list[str] | None, typer.Argument(help="Labels of methods; left out, all against the first.")] = None,
    store: Place = None,
    json: Json = False,
) -> None:
    """Compare methods of a study in pairs, across the tasks they share."""
    from deltatune.study.report.report import evidence_of
    from deltatune.study.statistics import paired

    evidence, methods = evidence_of(_open(store), name), methods or []
    if unknown := [one for one in methods if one not in evidence.methods]:
        raise UnknownName(f"`{unknown[0]}` has no scores in `{name}`. {nearest(unknown[0], evidence.methods)}")
    first, *others = methods if len(methods) > 1 else [*methods, *(one for one in evidence.methods if one not in methods)]
    found = paired(evidence.scores(), [(other, first) for other in others])
    if json:
        show_json([vars(one) for one in found])
        return
    drawn = table("method", "against", "difference", "95% interval", "better on", "p (Holm)", right=("difference", "better on", "p (Holm)"))
    for one in found:
        interval, wins = f"{one.low:+.3f} to {one.high:+.3f}", f"{one.wins:g} of {one.tasks}"
        drawn.add_row(Text(one.method, style="cyan"), one.other, f"{one.difference:+.3f}", interval, wins, f"{one.corrected:.2g}")
    show(drawn)


def _open(place: str | None) -> Store:
    try:
        from deltatune.study.store.store import Store
    except ImportError as cause:
        if (cause.name or "").partition(".")[0] not in ("sqlalchemy", "alembic"):
            raise
        raise missing_extra("sqlalchemy", "study") from cause
    return Store(place)


def _asked(what: str, profile: Any, name: str | None) -> Study:
    """The study that a file or an experiment's name stands for."""
    from deltatune.study.design import Profile, read_study
    from deltatune.study.experiments import experiments

    if profile not in get_args(Profile):
        raise InvalidValue(f"`--profile {profile}` is neither quick nor full.")
    is_file = Path(what).suffix in (".yaml", ".yml") or Path(what).is_file()
    found = read_study(what) if is_file else experiments[what].study(profile)
    return found if name is None else replace(found, name=name)


def _conduct(store: Store, name: str, how: Conduct) -> None:
    from deltatune.study.driver import Driver

    place = how.folder or _folder(store, name)
    driver = Driver(store, name, place, _runner(how), _show(how.json), fuse=how.fuse, again=how.again)
    try:
        progress = driver.run()
    except KeyboardInterrupt:
        note(f"Nothing is lost: `deltatune study resume {name}` goes on.")
        raise
    if not how.json:
        note(f"{name}: {progress.done} of {plural(progress.total, 'trial')} done.")
        show_command(f"deltatune study report {name}")
    if progress.failed:
        raise Unsupported(f"{plural(progress.failed, 'trial')} failed; the others are done. `deltatune study status {name}` says why.")


def _folder(store: Store, name: str) -> Path:
    return _beside(store) / "studies" / name


def _beside(store: Store) -> Path:
    file = store.engine.url.database if store.engine.dialect.name == "sqlite" else None
    return Path(file).parent if file else Path("runs")


def _runner(how: Conduct) -> Callable[..., Runner]:
    from deltatune.study.runner.local import LocalRunner

    resources = (how.address, how.workers, how.cpus, how.gpus)
    if how.runner == "local":
        if any(one is not None for one in resources):
            raise InvalidValue("`--address`, `--workers`, `--cpus` and `--gpus` belong to Ray. Add --runner ray, or leave them out.")
        return LocalRunner
    if how.runner != "ray":
        raise InvalidValue(f"There is no runner called `{how.runner}`. Known: `local`, `ray`.")
    from deltatune.study.runner.ray import Resources, ray_runner

    return ray_runner(Resources(*resources))


def _show(json: bool) -> Show:
    from deltatune.study import shows

    if json:
        return shows.Events()
    return shows.Panel() if sys.stderr.isatty() else shows.Lines()


def _plain(record: Record) -> dict[str, Any]:
    names = ("key", "backbone", "task", "category", "method", "seed", "cell", "state", "metric", "score", "attempts", "error")
    return {name: getattr(record, name) for name in names}
