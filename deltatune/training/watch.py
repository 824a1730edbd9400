"""What scoring shows while it goes through its batches: a bar on a terminal, a line now and then elsewhere; see ``progress``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from deltatune.tasks.tensors import Watch

Show = Literal["auto", "bar", "lines", "none"]
"""How to show it; ``auto`` is a bar on a terminal and lines elsewhere."""

SECONDS = 5.0
"""Between two lines where there is no terminal."""

Tell = Callable[[int, int, float], None]
"""Takes the rows done, the rows in all, and the seconds since the first."""


@contextmanager
def watching(label: str, file: TextIO | None = None, show: Show = "auto") -> Iterator[Watch]:
    """Gives what shows how far the scoring of rows is: a bar that goes when it ends, or a line every ``SECONDS``.

    Args:
        label: in front of everything, such as the method's name.
        file: where to; standard error if left out, so that output can be piped.
        show: how.
    """
    out = sys.stderr if file is None else file
    if show == "none":
        yield iter
        return
    if not is_bar(show, out):
        yield lambda batches: _watched(_lines(label, out), batches)
        return
    with progress_bar(out, transient=True) as bar:
        yield lambda batches: _watched(_moves(label, bar), batches)


def is_bar(show: Show, file: TextIO) -> bool:
    """Whether that way of showing is a bar where ``file`` goes."""
    return show == "bar" or (show == "auto" and file.isatty())


def progress_bar(file: TextIO, *, transient: bool = False) -> Progress:
    """A bar that counts, with a field ``numbers`` for what else there is to say; ``transient`` if it goes when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    return Progress(*columns, console=Console(file=file), transient=transient)


def speed(done: int, left: int, seconds: float, rows: int = 1) -> str:
    """Throughput and time left, from what was done in so many seconds.

    >>> speed(10, 40, 5.0, rows=16)
    '32 rows/s, 0:20 left'

    Args:
        done: steps behind us.
        left: steps ahead.
        seconds: that those behind us took.
        rows: of a step.
    """
    seconds = max(seconds, 1e-9)
    return f"{done * rows / seconds:.0f} rows/s, {clock(seconds / done * left)} left"


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any.

    >>> clock(7), clock(3_661)
    ('0:07', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _watched(tell: Tell, batches: Sequence[list[int]]) -> Iterable[list[int]]:
    """The batches, one by one; behind each, ``tell`` hears how far it is."""
    total, done, began = sum(map(len, batches)), 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch)
        tell(done, total, time.monotonic() - began)


def _moves(label: str, bar: Progress) -> Tell:
    shown = bar.add_task(label, total=None, numbers="")

    def tell(done: int, total: int, seconds: float) -> None:
        bar.update(shown, total=total, completed=done, numbers=speed(done, total - done, seconds))

    return tell


def _lines(label: str, file: TextIO) -> Tell:
    last = 0.0

    def tell(done: int, total: int, seconds: float) -> None:
        nonlocal last
        if seconds - last >= SECONDS and done < total:
            last = seconds
            print(f"{label} {done}/{total}: {speed(done, total - done, seconds)}", file=file, flush=True)

    return tell
