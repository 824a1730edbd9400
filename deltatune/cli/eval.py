"""``deltatune eval``: the score of a saved delta on its task's test rows."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.predict import loading
from deltatune.cli.terminal import Json, note, show, show_json, table, working


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
    from deltatune.training.predict import Predictor, data_of
    from deltatune.training.predict import evaluate as scored
    from deltatune.training.watch import watching

    record = read(delta_folder(folder))
    about = record.about
    with quiet():
        data = data_of(folder)
        with working(loading(record, f"score the {len(data.test):,} test rows of `{about.task}`")):
            predictor = Predictor.open(folder)
        with watching("scoring") as watch:
            values = scored(predictor, data, batch_size, watch)
    score, changed = values.pop("score"), about.data is not None and about.data != data.fingerprint
    if json:
        told = {"score": score, "metric": about.metric, "metrics": values, "task": about.task, "data_changed": changed}
        show_json(told, one_line=True)
        return
    drawn = table("metric", "test", "when trained", right=("test", "when trained"))
    for name, value in values.items():
        before = (about.metrics or {}).get(name)
        drawn.add_row(Text(name, style="cyan"), f"{value:.4f}", "-" if before is None else f"{before:.4f}")
    show(drawn)
    if changed:
        note(f"The rows of `{about.task}` are not those of the training (their fingerprint differs): the two columns do not compare.")
