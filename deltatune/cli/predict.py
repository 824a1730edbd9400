"""``deltatune predict``: labels for new texts, by a saved delta."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.terminal import Json, note, plural, show, show_json, table, working
from deltatune.errors import DataError

if TYPE_CHECKING:
    from deltatune.checkpoint.record import Record
    from deltatune.training.predict import Prediction

LONGEST = 120
"""Characters of a text that the table shows."""


@commands.register("predict")
def predict(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A run's folder, or one with a delta.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="The texts. Left out: a line of standard input each.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward.")] = 64,
    json: Json = False,
) -> None:
    """Label new texts with a saved delta.

    The texts of a pair are two arguments, or a line with a tab between them; of a choice, the texts and then the options.

    deltatune predict runs/bbc "Shares rise as the bank beats forecasts" "Striker out for the season"
    deltatune predict runs/bbc --json < headlines.txt
    """
    from deltatune.backbones.quiet import quiet
    from deltatune.checkpoint.format import read
    from deltatune.training.opening import delta_folder
    from deltatune.training.predict import Predictor, asked
    from deltatune.training.recorded import task_of
    from deltatune.training.watch import watching

    record = read(delta_folder(folder))
    task = task_of(record)
    width = task.kind.asking.width(task)
    rows = grouped(texts, width or len(texts)) if texts else [[line] if width == 1 else line.split("\t") for line in standard_input()]
    asked(task, rows)  # what is wrong with them is said before the backbone loads
    with quiet():
        with working(loading(record, f"label {plural(len(rows), 'text' if width == 1 else 'row')}")):
            predictor = Predictor.open(folder)
        with watching("labelling") as watch:
            said = predictor(rows, batch_size, watch)
    if json:
        shown = [{"text": row[0] if width == 1 else row, **asdict(prediction)} for row, prediction in zip(rows, said, strict=True)]
        show_json(shown)
        return
    drawn = table("label", "probability", "text", right=("probability",), whole=("label",))
    for row, prediction in zip(rows, said, strict=True):
        text = " | ".join(" ".join(part.split()) for part in row)
        probability = "" if prediction.score is None else f"{prediction.score:.3f}"
        drawn.add_row(Text(named(prediction), style="green"), probability, text[:LONGEST] + (" ..." if len(text) > LONGEST else ""))
    show(drawn)


def loading(record: Record, purpose: str) -> str:
    """What is loaded, and what for."""
    return f"Loading `{record.name}` and its backbone `{record.origin.id or record.origin.fingerprint.class_name}`, to {purpose}."


def named(prediction: Prediction) -> str:
    """A prediction's label in words: a name, several, or a number."""
    if isinstance(prediction.label, list):
        return ", ".join(prediction.label) or "-"
    return f"{prediction.label:.3f}" if isinstance(prediction.label, float) else str(prediction.label)


def grouped(texts: Sequence[str], width: int) -> list[list[str]]:
    """Texts in rows of ``width``.

    Raises:
        DataError: they do not fill the last row, or are not UTF-8.
    """
    for number, text in enumerate(texts, 1):
        if text != text.encode("utf-8", "replace").decode("utf-8"):  # how Python keeps bytes of an argument that are no UTF-8
            raise DataError(f"Text {number} is not UTF-8. Convert it, for instance with iconv.")
    if len(texts) % width:
        raise DataError(f"The task takes {width} texts a row, and {len(texts)} were given. Give {width} for each.")
    return [list(texts[start : start + width]) for start in range(0, len(texts), width)]


def standard_input() -> list[str]:
    """The lines of standard input.

    Raises:
        DataError: there are none, or they are not UTF-8.
    """
    if sys.stdin.isatty():
        note("Texts, a line each; end with Ctrl-D.")
    raw = sys.stdin.buffer.read()
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as cause:
        line = raw.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"Standard input is not UTF-8: line {line} holds the byte 0x{raw[cause.start]:02x}. Convert it, for instance with iconv."
        ) from None
    if not lines:
        raise DataError("There is no text: no argument was given, and standard input is empty. Write `deltatune predict DIR TEXT`.")
    return lines
