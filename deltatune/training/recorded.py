"""The task and the training that a delta file tells of, checked as they are read: they need no catalogue and no run.yaml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltatune.checkpoint.record import Record
from deltatune.errors import CheckpointError, DeltaError
from deltatune.tasks import Task, Template, Verbalizer
from deltatune.tasks.framing import framings

TOLD: dict[str, Callable[[Any], bool]] = {
    "framing": lambda value: isinstance(value, str) and value in framings,
    "max_length": lambda value: isinstance(value, int) and value > 0,
    "type": lambda value: isinstance(value, str),
    "text": lambda value: _are_names(value),
    "label": lambda value: isinstance(value, str),
    "metrics": lambda value: _are_names(value),
}
"""What opening a delta for predictions takes from the record of its training, and what it can be."""


def training_of(record: Record) -> dict[str, Any]:
    """The settings of the training.

    Raises:
        CheckpointError: the record lacks one that opening needs, or has one of another kind.
    """
    training = dict(record.about.training or {})
    lacking = [name for name in TOLD if name not in training]
    if record.about.task is None or lacking:
        raise CheckpointError(
            f"The delta `{record.name}` does not say how texts are put to it ({', '.join(lacking) or 'task'}). "
            "Deltas trained by dt.train do; with another one, dt.load it and call the backbone yourself."
        )
    for name, fits in TOLD.items():
        if not fits(training[name]):
            raise _edited(record, f"{training[name]!r} for `{name}` of its training")
    return training


def task_of(record: Record) -> Task:
    """The task a delta was trained for, rebuilt from its own record.

    Raises:
        CheckpointError: the record does not say, or says what cannot be.
    """
    about, training = record.about, training_of(record)
    try:
        task = Task(
            name=str(about.task),
            type=training["type"],
            text=tuple(training["text"]),
            label=training["label"],
            labels=tuple(about.labels or ()),
            metrics=tuple(training["metrics"]),
            range=_range(record),
            context=str(training.get("context") or ""),
            templates=() if about.template is None else (_template(record),),
        )
    except CheckpointError:
        raise
    except DeltaError as cause:
        raise _edited(record, f"a task that cannot be: {cause}") from cause
    if training["framing"] == "head" and record.origin.num_labels not in (None, task.outputs):
        raise _edited(record, f"{task.outputs} labels for a head of {record.origin.num_labels} outputs")
    return task


def _range(record: Record) -> tuple[float, float] | None:
    written = (record.about.training or {}).get("range")
    if written is None:
        return None
    if not isinstance(written, list | tuple) or len(written) != 2 or not all(isinstance(number, int | float) for number in written):
        raise _edited(record, f"{written!r} for the range of its numbers")
    return float(written[0]), float(written[1])


def _template(record: Record) -> Template:
    written = record.about.template
    if not isinstance(written, dict) or not isinstance(written.get("prompt"), str):
        raise _edited(record, f"{written!r} for its template")
    words = written.get("words")
    if words is not None and not _are_names(words):
        raise _edited(record, f"{words!r} for the words of its template")
    return Template(written["prompt"], Verbalizer(tuple(words)) if words else None)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(name, str) for name in value)


def _edited(record: Record, found: str) -> CheckpointError:
    return CheckpointError(
        f"The record of the delta `{record.name}` holds {found}. It was edited, or written wrongly: train or copy it again."
    )
