"""The task and the training that a delta file tells of, checked as they are read: they need no catalogue and no run.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltatune.checkpoint.record import Record
from deltatune.errors import CheckpointError, DeltaError
from deltatune.tasks import Task, Template, Verbalizer
from deltatune.tasks.framing import framings

TOLD: dict[str, Callable[[Any], bool]] = {
    "framing": lambda value: isinstance(value, str) and value in framings,
    "max_length": lambda value: isinstance(value, int) and value > 0,
    "type": lambda value: isinstance(value, str),
    "text": lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
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
            templates=() if about.template is None else (_template(record, about.template),),
            **_own(record, training),
        )
    except CheckpointError:
        raise
    except DeltaError as cause:
        raise _edited(record, f"a task that cannot be: {cause}") from cause
    if training["framing"] == "head" and record.origin.num_labels not in (None, task.outputs):
        raise _edited(record, f"{task.outputs} labels for a head of {record.origin.num_labels} outputs")
    return task


def of_type(task: Task) -> dict[str, Any]:
    """What a task's type needs to know again, as plain values; the inverse is read with the record."""
    told: dict[str, Any] = {}
    if task.range is not None:
        told["range"] = list(task.range)
    if task.context:
        told["context"] = task.context
    if task.parts:
        told["parts"] = [_told(part) for part in task.parts]
    return told


def _told(task: Task) -> dict[str, Any]:
    template = task.templates[0] if task.templates else None
    return {
        "name": task.name,
        "type": task.type,
        "text": list(task.text),
        "label": task.label,
        "labels": list(task.labels),
        "metrics": list(task.metrics),
        "template": None if template is None else {"prompt": template.prompt, "words": _words(template)},
        **of_type(task),
    }


def _words(template: Template) -> list[str] | None:
    return list(template.verbalizer.words) if template.verbalizer else None


def _own(record: Record, told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that belong to the task's type."""
    limits, context, parts = told.get("range"), told.get("context", ""), told.get("parts", [])
    if limits is not None and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_number, limits))):
        raise _edited(record, f"{limits!r} for the range of its numbers")
    if not isinstance(context, str) or not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
        raise _edited(record, f"{context!r} for its context, or {parts!r} for its parts")
    return {
        "range": None if limits is None else (float(limits[0]), float(limits[1])),
        "context": context,
        "parts": tuple(_part(record, part) for part in parts),
    }


def _part(record: Record, told: Mapping[str, Any]) -> Task:
    for name in ("name", "type", "label"):
        if not isinstance(told.get(name), str):
            raise _edited(record, f"{told.get(name)!r} for `{name}` of a part")
    for name in ("text", "labels", "metrics"):
        if not isinstance(told.get(name), list | tuple) or not all(isinstance(one, str) for one in told[name]):
            raise _edited(record, f"{told.get(name)!r} for `{name}` of a part")
    return Task(
        name=told["name"],
        type=told["type"],
        text=tuple(told["text"]),
        label=told["label"],
        labels=tuple(told["labels"]),
        metrics=tuple(told["metrics"]),
        templates=() if told.get("template") is None else (_template(record, told["template"]),),
        **_own(record, told),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _template(record: Record, written: Any) -> Template:
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
