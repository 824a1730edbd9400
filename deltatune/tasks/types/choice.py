"""Choice: one of the row's own options, be it multiple choice or the better sentence of a minimal pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import DataError, InvalidValue
from deltatune.tasks.rows import Row, inside
from deltatune.tasks.split import rank
from deltatune.tasks.template import LETTERS, OPTION, OPTIONS
from deltatune.tasks.tensors import SEVERAL, Features, moved, without
from deltatune.tasks.types.base import Asking, Head, Spoken, TaskType, task_types

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template


class ChoiceHead(Head):
    """s_j = head(texts, option j), one number each; l = -log softmax_j(s)_y over the row's own options."""

    def outputs(self, task: Task) -> int:
        """One an option, so rows may have unequally many."""
        return 1

    def encode(self, framing: HeadFraming, rows: Sequence[Row], *, labelled: bool) -> list[Features]:
        """``several``: the token ids of the texts with each option."""
        pairs = [{**row, OPTIONS: option} for row in rows for option in row[OPTIONS]]
        encoded = iter(framing.inputs.tokens(pairs, (*framing.task.text, OPTIONS)))
        features: list[Features] = [{SEVERAL: [next(encoded) for _ in row[OPTIONS]]} for row in rows]
        if labelled:
            for feature, row in zip(features, rows, strict=True):
                feature["labels"] = row[framing.task.label]
        return features

    def collate(self, framing: HeadFraming, features: Sequence[Features]) -> dict[str, Tensor]:
        """All options of all rows (sum of options, length), ``counts`` of options (batch,) and, if there are any, ``labels`` (batch,)."""
        batch = framing.inputs.padded([option for feature in features for option in feature[SEVERAL]])
        batch["counts"] = torch.tensor([len(feature[SEVERAL]) for feature in features])
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """Cross-entropy over each row's options; missing ones count as minus infinity."""
        return F.cross_entropy(self._table(model, batch), batch["labels"], reduction="sum")

    def scores(self, framing: HeadFraming, model: nn.Module, features: Sequence[Features]) -> list[Tensor]:
        """The scores (options,) of each row."""
        table = self._table(model, moved(self.collate(framing, features), model)).cpu()
        return [row[: len(feature[SEVERAL])] for row, feature in zip(table, features, strict=True)]

    def _table(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, most options), minus infinity where a row has fewer."""
        logits: Tensor = model(**without(batch, "counts")).logits.float()[:, 0]  # (sum of options,)
        counts = batch["counts"]
        there = torch.arange(int(counts.max()), device=logits.device) < counts[:, None]  # (batch, most options)
        return logits.new_full(there.shape, -torch.inf).masked_scatter(there, logits)

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> int:
        """The option of the largest score."""
        return int(scores.argmax())


class OptionWord(Spoken):
    """The option's letter where the prompt lists the options, else its text; both are known, so they are scored."""

    def prompted(self, task: Task) -> tuple[str, ...]:
        """Texts, ``options``, and ``option1``, ``option2``, ..."""
        return (*task.text, OPTIONS, *(f"{OPTION}{number}" for number in range(1, len(LETTERS) + 1)))

    def is_closed(self, task: Task) -> bool:
        """Always."""
        return True

    def options(self, task: Task, template: Template, row: Row) -> tuple[str, ...]:
        """Letters or texts."""
        return tuple(LETTERS[: len(row[OPTIONS])]) if template.lists_options else tuple(str(option).strip() for option in row[OPTIONS])

    def say(self, task: Task, template: Template, row: Row) -> str:
        """Letter or text of the right option."""
        return self.options(task, template, row)[row[task.label]]

    def understand(self, task: Task, template: Template, row: Row, text: str) -> int:
        """The option of that letter or text; -1, which is never right, where there is none."""
        options, said = self.options(task, template, row), text.strip()
        if said in options:
            return options.index(said)
        plain = [option.strip("().:").lower() for option in options]
        return plain.index(said.strip("().:").lower()) if said.strip("().:").lower() in plain else -1


class WithOptions(Asking):
    """Texts and two options or more."""

    def width(self, task: Task) -> None:
        """Rows have as many options as they have."""

    def given(self, task: Task, parts: Sequence[str]) -> Row:
        """Texts, then options."""
        width = len(task.text)
        return {**super().given(task, parts[:width]), OPTIONS: _several(task, [str(part) for part in parts[width:]])}

    def asked(self, task: Task, row: Row) -> Row:
        """Texts and ``options``."""
        return {**super().asked(task, row), OPTIONS: _several(task, [str(option) for option in row.get(OPTIONS, ())])}


class Choice(TaskType):
    """A value is the index of an option; an encoded row lists its options in the column ``options``."""

    name = "choice"
    asks = "an option"
    answers = "label"
    metrics = ("accuracy",)
    fields = {"choices": True}  # noqa: RUF012
    head = ChoiceHead()
    spoken = OptionWord()
    asking = WithOptions()

    def read(self, task: Task) -> tuple[str, ...]:
        """Texts, options, and the label where there is one."""
        if task.choices is None:
            raise InvalidValue(f"The task `{task.name}` is a choice, but does not say where its options lie. Give it `choices`.")
        return (*task.text, *task.choices.read, *(() if task.choices.right else (task.label,)))

    def columns(self, task: Task) -> tuple[str, ...]:
        """Texts, ``options``, label."""
        return (*task.text, OPTIONS, task.label)

    def inputs(self, task: Task) -> tuple[str, ...]:
        """Questions with other options are other questions."""
        return (*task.text, OPTIONS)

    def is_withheld(self, task: Task, rows: Sequence[Row]) -> list[bool]:
        """Hubs mark a label that is kept back by -1 or by an empty text too; a minimal pair says its own."""
        if task.choices is not None and task.choices.right:
            return [False] * len(rows)
        return [empty or row[task.label] in (-1, "-1", "") for empty, row in zip(super().is_withheld(task, rows), rows, strict=True)]

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """Texts, options without letters of their own, and the index of the right one."""
        where = task.choices
        if where is None:
            options, index = list(row[OPTIONS]), row[task.label]
        elif where.right:  # in the order of their hashes, so that neither place gives the answer away
            options = sorted((str(row[where.right]), str(row[where.wrong])), key=rank)
            index = options.index(str(row[where.right]))
        else:
            found = [inside(row, column) for column in where.columns] if where.columns else inside(row, where.list)
            options = [str(one) for one in found]
            index = self._index(task, row, options)
        if not isinstance(index, int) or not 0 <= index < len(options):
            raise DataError(f"A row of `{task.name}` has the label {index!r} for {len(options)} options.")
        return {**{column: row[column] for column in task.text}, OPTIONS: bare(options), task.label: index}

    def _index(self, task: Task, row: Row, options: Sequence[str]) -> int:
        where, label = task.choices, inside(row, task.label)
        assert where is not None
        keys = [str(key) for key in inside(row, where.keys)] if where.keys else _keys(where.first, len(options))
        if str(label) not in keys:
            raise DataError(
                f"A row of `{task.name}` has the label {label!r} in `{task.label}`; its options go by {', '.join(keys)}. Correct `choices`."
            )
        return keys.index(str(label))

    def stratum(self, task: Task, row: Row) -> None:
        """Nothing: the place of the right option is no class."""

    def constant(self, task: Task, rows: Sequence[Row]) -> int:
        """The commonest place of the right option."""
        places = [int(row[task.label]) for row in rows]
        return max(sorted(set(places)), key=places.count)

    def named(self, task: Task, row: Row, value: Any) -> str:
        """The option's text."""
        return str(row[OPTIONS][value])

    def shares(self, task: Task, row: Row, scores: Tensor) -> dict[str, float]:
        """softmax(scores), by the options' texts."""
        return dict(zip(map(str, row[OPTIONS]), scores[: len(row[OPTIONS])].softmax(-1).tolist(), strict=True))


def _several(task: Task, options: list[str]) -> list[str]:
    if len(options) < 2:
        raise DataError(f"`{task.name}` chooses among options, and {len(options)} were given. Give two or more behind the texts.")
    return options


def bare(options: Sequence[str]) -> list[str]:
    """Options without letters of their own, where each has its own: ``A) yes`` is ``yes``.

    >>> bare(["A)yes", "B) no"]), bare(["A", "Bob"])
    (['yes', 'no'], ['A', 'Bob'])
    """
    stripped = [option.strip() for option in options]
    inner = [option.lstrip("(") for option in stripped]
    marked = all(one[:1] == letter and one[1:2] in (")", ".", ":") for one, letter in zip(inner, LETTERS, strict=False))
    return [one[2:].strip() for one in inner] if marked else stripped


def _keys(first: str, count: int) -> list[str]:
    """What the label says for each option, from what it says for the first."""
    return [str(int(first) + index) for index in range(count)] if first.isdigit() else [chr(ord(first) + index) for index in range(count)]


task_types.register("choice")(Choice())
