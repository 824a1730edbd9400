"""``stack``: deltas that learn a language from plain text, and on top of them one that learns a task; the language may change below it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltatune.checkpoint.format import load
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import Composition
from deltatune.injection.delta import Delta
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.stages import SUMMED, Numbers, joined, stage
from deltatune.study.procedures.stream import item_of
from deltatune.study.trial import Outcome, Trial
from deltatune.tasks import Rows, Task, TaskData, get_task
from deltatune.training.borrowed import trainer_modules
from deltatune.training.job import load_framed, spelled
from deltatune.training.place import DELTA
from deltatune.training.run import Run, load_data
from deltatune.training.train import sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE, THEN, TASK = "language", "then", "task"
WRITES = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Texts:
    """Plain text: a column of a task.

    Attributes:
        task: its name.
        column: the texts.
    """

    task: str
    column: str

    def load(self) -> TaskData:
        """The column as a task of its own, which is learnt token by token.

        Raises:
            InvalidValue: the task has no such column.
        """
        data = load_data(self.task)
        if self.column not in (known := (*data.task.text, data.task.label)):
            raise InvalidValue(
                f"`{self.task}` has no column `{self.column}`, of which a language was to be learnt; it has {', '.join(known)}."
            )
        plain = Task(f"{self.task}.{self.column}", "plain", (self.column,), self.column, metrics=("log_likelihood", "perplexity"))
        train, validation, test = (Rows({self.column: list(rows[self.column])}) for rows in data.splits.values())
        return TaskData(plain, train, validation, test, data.source)


@dataclass(frozen=True)
class Stack:
    """What is stacked.

    Attributes:
        language: texts of the language that lies below while the task is learnt; None where there is none.
        then: texts of the language that takes its place before the test; None where it stays.
        source: the task that is learnt.
        steps: of learning a language; as many as of the task if left out.
    """

    language: Texts | None
    then: Texts | None
    source: str
    steps: int | None


@procedures.register("stack")
def stack(trial: Trial, folder: Path) -> Outcome:
    """Learn a language, freeze it, learn a task on top, and score the trial's own task.

    The last method of the run learns the task, the ones before it a language together. ``numbers["languages"]`` has for each text the
    perplexity on its test rows ``before`` it was learnt and ``after``. A finished training is on disk.

    Options:
        language: ``{task: name, column: name}``, the texts of the language; none is learnt if left out.
        then: the same of the language that takes its place before the test.
        source: a mapping from the trial's task to the one that is learnt; a task that is not in it is learnt itself.
        steps: of learning a language.

    Raises:
        InvalidValue: options that cannot be, or one method where a language is to be learnt.
        Unsupported: a backbone that does not write, or a task that it answers by a head.
        UnknownName: a task nobody knows.
    """
    began, run, wanted = time.perf_counter(), trial.run, asked(trial)
    with trainer_modules():
        torch.manual_seed(run.settings.seed)
        target = sampled(load_data(run.task, run.settings), run.settings)
        backbone, tokenizer, framing = load_framed(run.backbone, target.task, run.settings)
        if framing.auto_class != WRITES:
            raise Unsupported(
                f"`{trial.said}` has no words for its answers, but a language is learnt by the next token. Take a decoder and "
                "`framing: text2text`."
            )
        course = _Course(run, folder, wanted, backbone, tokenizer)
        trainings = course.conduct()
        scores = item_of(target, backbone, tokenizer, run).measured(backbone, run.settings.eval_batch_size)
    numbers, history = joined(trainings, summed=SUMMED)
    numbers |= {**scores, "languages": course.perplexities}
    return Outcome(trial.key, numbers, history, round(time.perf_counter() - began, 3))


def asked(trial: Trial) -> Stack:
    """What the options ask for.

    Raises:
        InvalidValue: they cannot be, or one method where a language is to be learnt.
        UnknownName: a task nobody knows.
    """
    told, count = trial.options, len(trial.run.methods)
    texts = {name: _texts(told[name]) for name in (LANGUAGE, THEN) if name in told}
    source, steps = told.get("source", {}), told.get("steps")
    counted = steps is None or (isinstance(steps, int) and steps > 0)
    if None in texts.values() or not isinstance(source, Mapping) or not counted or (count < 2 if texts else count != 1):
        raise InvalidValue(
            f"The procedure `stack` of `{trial.said}` was given {dict(told)} and {count} methods. It wants `language` and `then` as "
            "{task: name, column: name}, `source` as {the trial's task: another} and a whole number of `steps`, each of which may be left "
            "out; and a method for the task, behind those for the language if there is one."
        )
    name = str(source.get(trial.task, trial.task))
    for one in (name, *(text.task for text in texts.values() if text is not None)):
        get_task(one)  # ahead of hours of training
    return Stack(texts.get(LANGUAGE), texts.get(THEN), name, steps)


def _texts(told: Any) -> Texts | None:
    if isinstance(told, Mapping) and {"task", "column"} == set(told):
        return Texts(str(told["task"]), str(told["column"]))
    return None


class _Course:
    """One trial: its backbone, and what is stacked on it."""

    def __init__(self, run: Run, folder: Path, wanted: Stack, backbone: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run, self.folder, self.wanted = run, folder, wanted
        self.backbone, self.tokenizer = backbone, tokenizer
        self.perplexities: dict[str, dict[str, float]] = {}

    def conduct(self) -> list[Numbers]:
        """The numbers of each training, the task's last; what is to be scored acts behind it."""
        below, trainings = None, []
        if self.wanted.language is not None:
            below, numbers = self._language(LANGUAGE, self.wanted.language)
            trainings.append(numbers)
        top, learnt = self._task()
        if self.wanted.then is not None:
            for one in (top, below):
                if one is not None:
                    detach(one)
            trainings.append(self._language(THEN, self.wanted.then)[1])
            load(self.backbone, self.folder / TASK / DELTA)
        return [*trainings, learnt]

    def _language(self, name: str, texts: Texts) -> tuple[Delta | Composition, Numbers]:
        """Deltas that learnt a language, frozen."""
        data = texts.load()
        steps = self.wanted.steps or self.run.settings.max_steps
        settings = replace(self.run.settings, max_steps=steps, framing="plain", template=0, manual_template=True)
        item = item_of(data, self.backbone, self.tokenizer, replace(self.run, settings=settings))
        before = item.measured(self.backbone, settings.eval_batch_size)

        def fresh() -> Delta | Composition:
            return attach(self.backbone, list(self.run.methods[:-1]), name=name)

        learnt, numbers = stage(self.folder / name, self.backbone, fresh, data, settings, self.tokenizer)
        for delta in learnt.deltas if isinstance(learnt, Composition) else [learnt]:
            delta.freeze()
        self.perplexities[data.task.name] = {
            "before": before["metrics"]["perplexity"], "after": numbers["metrics"]["perplexity"]
        }  # fmt: skip
        return learnt, numbers

    def _task(self) -> tuple[Delta, Numbers]:
        """The delta that learnt the task, on top of what is there."""
        run = self.run
        data = sampled(load_data(self.wanted.source, run.settings), run.settings)
        framing = item_of(data, self.backbone, self.tokenizer, run).framing

        def fresh() -> Delta:
            [method] = spelled(run.methods[-1:], self.tokenizer, framing)
            return attach(self.backbone, method, run.where, layers=run.layers, name=TASK)

        return stage(self.folder / TASK, self.backbone, fresh, data, run.settings, self.tokenizer)
