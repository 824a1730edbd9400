"""How a delta is trained: every knob of the main job, checked where it is set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deltatune.errors import InvalidValue, UnknownName, nearest
from deltatune.tasks.framing import framings

Quantize = Literal["int8", "nf4"]
Precision = Literal["fp32", "bf16"]
Place = Literal["memory", "disk"]

LARGEST = 2**32
"""Whole numbers are smaller: more no seed can be, and no count has to be."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run; a field left out has a value that suits a small delta on a small task.

    Attributes:
        epochs: passes over the training rows; ``max_steps`` overrides it.
        max_steps: optimiser steps; None trains for ``epochs``.
        lr: peak learning rate; None takes the method's own.
        batch_size: rows a forward, on each device.
        grad_accumulation: forwards an optimiser step.
        warmup: share of the steps in which the rate rises from 0; it falls linearly to 0 afterwards.
        weight_decay: decoupled, of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        max_length: most tokens of one input.
        bf16: run forward and backward in bfloat16 where that is safe; parameters stay as they are.
        gradient_checkpointing: compute activations anew in the backward instead of keeping them.
        recompute: compute the inputs of adapted modules anew in the backward where a norm, an activation or dropout made them, as
            ``dt.recompute`` does: less memory for the same numbers.
        keep_frozen: compute what the frozen layers below the delta give for a training row once and keep it, in ``memory`` or on ``disk``;
            dropout is off there.
        early_stopping: stop after so many evaluations without a better validation score; None never stops.
        evaluations: how often the validation rows are scored in the course of the run; the best delta is kept.
        eval_rows: most validation rows that are scored each time; 0 takes all.
        eval_batch_size: rows a forward when scoring.
        test_rows: most test rows that are scored at the end; 0 takes all.
        save_steps: steps between two checkpoints; None saves when validation rows are scored.
        class_weights: weigh classes by 1 / frequency in the loss, so that rare ones count as much.
        new_head: give the task a fresh head where the backbone's file holds one with another number of outputs.
        framing: ``head`` (one output per label), ``text2text`` (words), ``cloze`` (a masked word), or ``auto``, by the backbone's kind.
        template: which of the task's templates the text-to-text and the cloze framing use.
        manual_template: with the task's template; without, the columns stand alone, and only the label words are kept.
        temperature: of a mixture of tasks; 1 takes each row once, more lets small tasks give more rows.
        shots: train on so many rows of each class (or in all, where there are no classes), and validate on as many; None takes all.
        shots_seed: of the draw of these rows, and of `train_rows`.
        train_rows: train on at most so many rows, drawn without regard to class; 0 takes all. Validation rows stay what they are.
        streaming: read training rows one after the other while training, never all of them; it takes ``max_steps``.
        packing: fill each training example with several texts or chats, which do not see each other.
        quantize: load the backbone in int8 (torchao) or nf4 (bitsandbytes).
        seed: of the head's weights, the patches' weights, dropout and the order of rows.
        report_to: experiment trackers of transformers, such as ``("tensorboard",)``.

    Raises:
        InvalidValue: a value out of its range.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    lr: float | None = None
    batch_size: int = 16
    grad_accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 128
    bf16: bool = False
    gradient_checkpointing: bool = False
    recompute: bool = False
    keep_frozen: Place | None = None
    early_stopping: int | None = None
    evaluations: int = 5
    eval_rows: int = 512
    eval_batch_size: int = 64
    test_rows: int = 0
    save_steps: int | None = None
    class_weights: bool = False
    new_head: bool = False
    framing: str = "auto"
    template: int = 0
    manual_template: bool = True
    streaming: bool = False
    packing: bool = False
    temperature: float = 1.0
    shots: int | None = None
    shots_seed: int = 13
    train_rows: int = 0
    quantize: Quantize | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", _names(self.report_to))
        for field in dataclasses.fields(self):
            self._check_size(field.name, getattr(self, field.name))
        for name in ("epochs", "batch_size", "grad_accumulation", "max_length", "eval_batch_size"):
            self._check(name, getattr(self, name) > 0, "greater than 0")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "evaluations",
            "eval_rows",
            "test_rows",
            "train_rows",
            "template",
            "seed",
            "shots_seed",
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("warmup", 0 <= self.warmup < 1, "a share of all steps, at least 0 and less than 1")
        for name in ("max_steps", "lr", "early_stopping", "save_steps", "shots"):
            value = getattr(self, name)
            self._check(name, value is None or value > 0, "greater than 0, or left out")
        self._check("early_stopping", self.early_stopping is None or self.evaluations > 0, "used with `evaluations` above 0")
        self._check("streaming", not self.streaming or self.max_steps is not None, "used with `max_steps`: a stream has no length")
        self._check("shots", not (self.shots and self.train_rows), "used without `train_rows`: each says how many rows there are")
        for name in ("shots", "train_rows"):
            self._check("streaming", not (self.streaming and getattr(self, name)), f"used without `{name}`, which chooses from all rows")
        self._check(
            "streaming", not (self.streaming and self.keep_frozen), "used without `keep_frozen`, which keeps something of every row"
        )
        self._check("streaming", not (self.streaming and self.class_weights), "used without `class_weights`, which counts all rows")
        self._check("temperature", self.temperature >= 1, "1 or more")
        self._check("framing", self.framing == "auto" or self.framing in framings, f"one of auto, {', '.join(framings)}")
        self._check("quantize", self.quantize in (None, *get_args(Quantize)), f"one of {', '.join(get_args(Quantize))}, or left out")
        self._check("keep_frozen", self.keep_frozen in (None, *get_args(Place)), f"one of {', '.join(get_args(Place))}, or left out")

    def _check_size(self, name: str, value: Any) -> None:
        if isinstance(value, float):
            self._check(name, math.isfinite(value), "a finite number")
        elif isinstance(value, int):
            self._check(name, value < LARGEST, f"less than {LARGEST}")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InvalidValue(f"The setting `{name}` is {getattr(self, name)!r}; it has to be {rule}.")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Settings:
        """Settings from loose values, as a command line or a ``run.yaml`` gives them; None stands for the default.

        >>> Settings.of({"lr": "2e-4", "batch_size": 8}).lr
        0.0002

        Raises:
            UnknownName: no setting has one of the names.
            InvalidValue: a value of the wrong type or out of its range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in fields.items():
            if name not in known:
                raise UnknownName(f"There is no setting called `{name}`. {nearest(name, known)}")
            if value is not None:
                values[name] = _typed(name, value, str(known[name].type))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        return {**dataclasses.asdict(self), "report_to": list(self.report_to)}


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(name for name in value.replace(",", " ").split() if name != "none")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InvalidValue(f"The setting `report_to` is {value!r}; it has to be a list of names.")
    return tuple(value)


def _typed(name: str, value: Any, declared: str) -> Any:
    """``value`` as the field's declared type; YAML reads 2e-4 as a text, and a shell gives texts only."""
    kind = declared.removesuffix(" | None")
    if kind not in ("int", "float", "bool"):
        return value
    try:
        if kind == "bool":
            return _truth(value)
        number = float(value)
        return number if kind == "float" else _whole(number)
    except (TypeError, ValueError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise InvalidValue(f"The setting `{name}` is {value!r}; it has to be {wanted}.") from None


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(number)
    return int(number)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]
