"""``deltatune demo``: the main job from end to end, in a few minutes on a CPU: train, compare, save, open again, use."""

from __future__ import annotations

import json as json_
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deltatune.cli.commands import commands
from deltatune.cli.predict import named
from deltatune.cli.terminal import Json, console, quoted, share, show, show_json, size, table

if TYPE_CHECKING:
    from deltatune.training.result import Result

BACKBONE, TASK = "minilm", "bbc-news"
PROBE, LORA, FULL = "linear-probe", "lora", "full"

TRAINING: dict[str, Any] = {"epochs": 3, "max_length": 64, "batch_size": 16}
TIMED: dict[str, Any] = {"max_steps": 10, "evaluations": 0, "test_rows": 16}
"""Of full fine-tuning: enough steps to time one."""

HEADLINES = ("Shares rise as the bank beats forecasts", "Striker ruled out of the cup final with a knee injury")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: name of the method.
        accuracy: on the test rows; None where it was only timed.
        trained: parameters.
        share: of the backbone's.
        seconds_per_step: median of an optimiser step.
        peak_memory_bytes: most memory the process held.
        disk_bytes: of the saved delta; of the whole backbone for full fine-tuning.
    """

    method: str
    accuracy: float | None
    trained: int
    share: float
    seconds_per_step: float
    peak_memory_bytes: int
    disk_bytes: int


@commands.register("demo")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder; what an earlier demo left there is replaced.")] = Path(
        "runs/demo"
    ),
    json: Json = False,
) -> None:
    """Train a LoRA delta for BBC News on a CPU, compare, save it, open it again, and classify two headlines.

    Takes about four minutes on two cores.
    """
    began = time.monotonic()
    _say(f"Which of five topics is a news article about? `{TASK}` on the frozen backbone `{BACKBONE}`.")
    _say("Three methods, together about four minutes on two cores; in front, the time so far.")
    rows = [_probe(began), _lora(began, out), _full(began)]
    numbers = [vars(row) for row in rows]
    (out / "comparison.json").write_text(json_.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    said = _classify(out)
    seconds = round(time.monotonic() - began, 1)
    if json:
        show_json({"rows": numbers, "headlines": said, "seconds": seconds, "out": str(out)}, one_line=True)
        return
    show(
        "",
        _table(rows),
        quoted(f"`{FULL}` was timed for {TIMED['max_steps']} steps only; its file would be the whole model.", "dim"),
    )
    show("", quoted(f"`{out}` holds the delta, `metrics.json`, `curve.png` and `run.yaml`. Opened again on a fresh backbone, it says:"), "")
    for headline, label in said.items():
        show(Text.assemble("  ", (f"{label:14}", "bold green"), headline))
    show("", quoted(f'Took {seconds:.0f} s. Your turn: `deltatune predict {shlex.quote(str(out))} "..."`, `deltatune tune --help`'))


def _probe(began: float) -> Row:
    _begin(f"1/3  `{PROBE}`: the head alone trains.", began)
    with tempfile.TemporaryDirectory(prefix="deltatune-") as folder:
        return _row(PROBE, _train(PROBE, Path(folder) / "run", **TRAINING))


def _lora(began: float, out: Path) -> Row:
    _begin(f"2/3  `{LORA}`: the head, and a low-rank change of the attention's queries and values.", began)
    return _row(LORA, _train(LORA, out, lr=3e-3, **TRAINING))


def _full(began: float) -> Row:
    _begin(f"3/3  `{FULL}`: every parameter, for {TIMED['max_steps']} steps, to time them.", began)
    return _row(FULL, _train(FULL, None, **(TRAINING | TIMED)), timed=True)


def _train(method: str, out: Path | None, **settings: Any) -> Result:
    """One run; the methods come in the order of their memory, which a process seldom gives back."""
    from deltatune.training.train import train

    return train(BACKBONE, TASK, method, out=out, overwrite=True, **settings)


def _row(method: str, result: Result, timed: bool = False) -> Row:
    return Row(
        method=method,
        accuracy=None if timed else result.score,
        trained=result.trainable_parameters,
        share=result.trainable_parameters / result.total_parameters,
        seconds_per_step=result.seconds_per_step,
        peak_memory_bytes=result.peak_memory_bytes,
        disk_bytes=result.delta_bytes,
    )


def _classify(out: Path) -> dict[str, str]:
    from deltatune.training.predict import predict

    said = predict(out, HEADLINES)
    return {headline: named(prediction) for headline, prediction in zip(HEADLINES, said, strict=True)}


def _table(rows: list[Row]) -> Any:
    numbers = ("test accuracy", "trained", "share", "per step", "peak memory", "on disk")
    drawn = table("method", *numbers, right=numbers, whole=("method",))
    for row in rows:
        drawn.add_row(
            Text(row.method, style="cyan"),
            "-" if row.accuracy is None else f"{row.accuracy:.3f}",
            f"{row.trained:,}",
            share(row.share, 1),
            f"{row.seconds_per_step:.2f} s",
            size(row.peak_memory_bytes),
            size(row.disk_bytes),
        )
    return drawn


def _begin(part: str, began: float) -> None:
    from deltatune.training.watch import clock

    _say(f"{clock(time.monotonic() - began)}  {part}")


def _say(text: str) -> None:
    """A step of the demo, on standard error beside the progress bars."""
    console(stderr=True).print(quoted(text, style="bold"))
