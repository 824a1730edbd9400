"""``deltatune tune --jobs``: many deltas trained together, and the table that ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from deltatune.cli.terminal import note, plural, show, show_json, table
from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.fields import in_short
from deltatune.methods.kinds import methods
from deltatune.methods.making import settings_of

if TYPE_CHECKING:
    from deltatune.multi.together.job import Outcome

SHOWN = ("score", "metric", "trainable_parameters", "seconds", "delta_bytes", "steps", "out")


def tune_together(
    file: Path, backbone: str | None, out: Path | None, settings: dict[str, Any], *, overwrite: bool, json: bool, other: Mapping[str, Any]
) -> None:
    """Train the jobs of a file.

    Args:
        file: ``jobs.yaml``.
        backbone: over the file's.
        out: over the file's.
        settings: of all jobs, over the file's.
        overwrite: replace runs that are there.
        json: end with one line of JSON.
        other: options that describe a single run, which must not be given.

    Raises:
        InvalidValue: an option that describes a single run, or no backbone.
        Unsupported: a job failed; the others are finished.
    """
    from deltatune.multi.together.file import read_jobs
    from deltatune.multi.together.together import train_together

    for flag, value in other.items():
        if value:
            raise InvalidValue(
                f"`{flag}` describes a single run, but `--jobs {file}` was given. Write it into the file, to the job it is of."
            )
    asked = read_jobs(file, settings)
    name = backbone or asked.backbone
    if name is None:
        raise InvalidValue(f"`{file}` does not say its `backbone`. Add it, or give `--backbone`.")
    folder = out or Path(asked.out or f"runs/{file.stem}")
    note(f"Loading `{name}`, to train {plural(len(asked.jobs), 'job')} together into `{folder}`.")
    outcomes = train_together(asked.jobs, name, out=folder, overwrite=overwrite, at_once=asked.at_once, tokens=asked.tokens)
    if json:
        show_json({"jobs": [_plain(outcome) for outcome in outcomes]}, one_line=True)
    else:
        show("", _table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        told = "; ".join(f"{outcome.name}: {outcome.error}" for outcome in failed)
        raise Unsupported(f"{len(failed)} of {plural(len(outcomes), 'job')} failed. {told}")


def _plain(outcome: Outcome) -> dict[str, Any]:
    numbers = {name: outcome.numbers[name] for name in SHOWN if name in outcome.numbers}
    return {"name": outcome.name, **numbers, "apart": outcome.apart, "error": None if outcome.error is None else str(outcome.error)}


def _table(outcomes: Sequence[Outcome]) -> Any:
    columns = ("job", "method", "score", "metric", "trained", "time", "where")
    made = table(*columns, right=("score", "trained", "time"), whole=("job", "method"))
    for outcome in outcomes:
        recipes = " and ".join(in_short(methods.name_of(type(method)), settings_of(method)) for method in outcome.job.methods)
        if outcome.error is not None:
            made.add_row(outcome.name, recipes, Text("failed", style="red"), "", "", "", "")
            continue
        numbers = outcome.numbers
        made.add_row(
            outcome.name,
            recipes,
            Text(f"{numbers['score']:.4f}", style="bold green"),
            str(numbers["metric"]),
            f"{numbers['trainable_parameters']:,}",
            f"{numbers['seconds']:.1f} s",
            f"{numbers['out']}{' (by itself)' if outcome.apart else ''}",
        )
    return made
