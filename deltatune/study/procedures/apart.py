"""Work in a process of its own, so that what is measured there is not what was left behind here."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from deltatune.errors import DeltaError, Unsupported

T = TypeVar("T")


class Ended(Exception):
    """A process ended without a result: it was killed, or raised an error that is not of ours."""


def apart(work: Callable[..., T], *given: Any) -> T:
    """What ``work(*given)`` gives in a fresh process, which ends with this call and with this process.

    Args:
        work: a function of a module.
        given: its arguments; they and the result have to be such as ``pickle`` takes.

    Raises:
        DeltaError: what ``work`` raises.
        Ended: the process was killed, or another error was raised.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, given))
    process.start()
    there.close()
    try:
        result, error = here.recv()
    except EOFError:
        process.join()
        raise Ended(f"The process ended with code {process.exitcode} and without a result.") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _answer(there: Connection, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        there.send((work(*given), None))
    except DeltaError as error:
        there.send((None, error))
    except Exception as error:
        there.send((None, told(error)))


def _end_with_parent() -> None:
    """A driver that is killed leaves nobody who measures on, in the way of the next."""
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def told(error: Exception) -> Exception:
    """An error of another process as this one raises it: memory that is lacking will lack again, anything else may not."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return Unsupported(
            "This needs more memory than is free here. Do it where there is more: `deltatune study resume NAME --again` tries what failed."
        )
    return Ended("".join(traceback.format_exception(error)))
