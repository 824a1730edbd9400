"""``deltatune tune --dry-run``: what the run's steps would need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltatune.cli.terminal import facts, note, plural, show, show_json, size

if TYPE_CHECKING:
    from deltatune.training.forecast import Estimate
    from deltatune.training.run import Run


def dry(run: Run, *, json: bool) -> None:
    """Estimate the run, and print what was found.

    Args:
        run: what would be trained.
        json: one line of JSON in place of words.
    """
    from deltatune.training.estimate import estimate
    from deltatune.training.measure import available

    note(f"Estimating a step of `{run.backbone}`; nothing is trained or written.")
    free = available()
    found = estimate(run.backbone, run.task, run.methods, where=run.where, layers=run.layers, **run.settings.to_dict())
    if json:
        show_json({**found.to_json(), "available_bytes": free}, one_line=True)
        return
    _show(found, free)


def _show(found: Estimate, free: int | None) -> None:
    most = found.resident_bytes or found.live_bytes
    process = f", {size(found.resident_bytes)} of the process" if found.resident_bytes is not None else ""
    beside = "" if free is None else f"; {size(free)} were free"
    memory, time = found.tokens
    show(
        "",
        facts(
            ("peak memory", f"{size(found.live_bytes)} of live tensors{process}, for {plural(found.rows, 'row')} of {memory} tokens"),
            ("backbone", f"{size(found.backbone_bytes)} beside that{beside}"),
            ("step", f"{found.seconds:.2f} s ({found.processor_seconds:.2f} of the processor), for {time} tokens a row"),
            ("based on", _grounds(found)),
        ),
        "",
    )
    if free is not None and most + found.backbone_bytes > free:
        note("That is more than was free. Try a smaller `--batch-size` with `--grad-accumulation`, or `--gradient-checkpointing`.")


def _grounds(found: Estimate) -> str:
    counted = {
        "shapes": "memory: every tensor of two steps, counted by shape without computing it",
        "rows": "memory: real steps of few rows, continued on a line, since this backbone cannot run without numbers",
    }[found.counted]
    rows = " and ".join(str(count) for count in found.timed_rows)
    line = ", continued on a line" if len(found.timed_rows) > 1 else ""
    return f"{counted}; time: real steps of {plural(found.timed_rows[-1], 'row') if not line else f'{rows} rows'}{line}"
