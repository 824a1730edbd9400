"""``deltatune eval``: the score of a saved delta on its task's test rows."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.terminal import Json, show, show_json, table


@commands.register("eval")
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A run's folder, or one with a delta.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward.")] = 64,
    json: Json = False,
) -> None:
    """Score a saved delta on the test rows of the task it was trained for.

    deltatune eval runs/bbc
    """
    from deltatune.backbones.quiet import quiet
    from deltatune.checkpoint.format import read
    from deltatune.training.opening import delta_folder
    from deltatune.training.predict import evaluate as scored

    with quiet():
        values = scored(folder, batch_size=batch_size)
    about = read(delta_folder(folder)).about
    score = values.pop("score")
    if json:
        show_json({"score": score, "metric": about.metric, "metrics": values, "task": about.task}, one_line=True)
        return
    drawn = table("metric", "test", "when trained", right=("test", "when trained"))
    for name, value in values.items():
        before = (about.metrics or {}).get(name)
        drawn.add_row(Text(name, style="cyan"), f"{value:.4f}", "-" if before is None else f"{before:.4f}")
    show(drawn)
