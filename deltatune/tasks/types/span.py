"""Span: a piece of the context, as in extractive question answering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.tensors import SEVERAL, Features, inputs_of, moved, without
from deltatune.tasks.types.base import Head, TaskType, answered, task_types
from deltatune.tasks.types.generation import FreeText

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

LONGEST = 64
"""Most tokens of a span that a head can name."""


class SpanHead(Head):
    """l = -log softmax(start)_s - log softmax(end)_e over the context's tokens; a long context is read in windows.

    Two outputs a token, as transformers' question answering heads have them, by the token classification class: that of
    question answering loses the backbone's weights for Llama, whose prefix differs there.
    """

    auto_class = "AutoModelForTokenClassification"

    def outputs(self, task: Task) -> int:
        """A start and an end."""
        return 2

    def encode(self, framing: HeadFraming, rows: Sequence[Row], *, labelled: bool) -> list[Features]:
        """For training the window around the answer, with ``labels`` the answer's first and last token; else all windows of the context."""
        task = framing.task
        asked = [" ".join(text_of(row[column]).strip() for column in task.text if column != task.context) for row in rows]
        texts = [text_of(row[task.context]) for row in rows]
        questions = [ids[: framing.inputs.room // 2] for ids in framing.inputs.bare(asked)]
        contexts = framing.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
        features = []
        for index, row in enumerate(rows):
            ids, places = contexts["input_ids"][index], contexts["offset_mapping"][index]
            room = framing.inputs.room - len(questions[index])
            if labelled:
                features.append(_around(framing, questions[index], ids, places, room, *_answer(task, row)))
            else:
                starts = range(0, max(len(ids) - room, 0) + 1, max(room // 2, 1)) if len(ids) > room else [0]
                last = max(len(ids) - room, 0)
                windows = [_window(framing, questions[index], ids, start, room) for start in dict.fromkeys([*starts, last])]
                features.append({SEVERAL: windows, "places": places, "text": texts[index]})
        return features

    def collate(self, framing: HeadFraming, features: Sequence[Features]) -> dict[str, Tensor]:
        """All windows (windows, length), ``readable`` where the context is, and, where there are any, ``labels`` (windows, 2)."""
        windows = [window for feature in features for window in inputs_of(feature)]
        batch = framing.inputs.padded(windows)
        length = batch["input_ids"].shape[1]
        place = torch.arange(length)
        batch["readable"] = torch.stack([(place >= one["begin"]) & (place < one["begin"] + one["count"]) for one in windows])
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of starts and of ends."""
        start, end = self._logits(model, batch)
        return F.cross_entropy(start, batch["labels"][:, 0], reduction="sum") + F.cross_entropy(end, batch["labels"][:, 1], reduction="sum")

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(**without(batch, "readable")).logits.float()  # (windows, length, 2)
        start, end = logits.masked_fill(~batch["readable"][..., None], -torch.inf).unbind(-1)
        return start, end

    def scores(self, framing: HeadFraming, model: nn.Module, features: Sequence[Features]) -> list[Tensor]:
        """For each row its best span: score, first and last token of the context, (3,)."""
        start, end = self._logits(model, moved(self.collate(framing, features), model))
        length = start.shape[1]
        place = torch.arange(length, device=start.device)
        allowed = (place[None] >= place[:, None]) & (place[None] < place[:, None] + LONGEST)
        table = (start[:, :, None] + end[:, None]).masked_fill(~allowed, -torch.inf).flatten(1)  # (windows, length * length)
        best, where = table.max(1)
        found, row = [], 0
        for feature in features:
            spans = []
            for window in feature[SEVERAL]:
                shift = window["first"] - window["begin"]
                spans.append([float(best[row]), int(where[row]) // length + shift, int(where[row]) % length + shift])
                row += 1
            found.append(torch.tensor(max(spans)))
        return found

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> str:
        """The text of the best span."""
        places = features["places"]
        if not places or not torch.isfinite(scores[0]):
            return ""
        return str(features["text"][places[int(scores[1])][0] : places[int(scores[2])][1]]).strip()


class Piece(FreeText):
    """The first right piece of the context."""

    def say(self, task: Task, template: Template, row: Row) -> str:
        """Its text."""
        return str(row[task.label]["text"][0]).strip()


class Span(TaskType):
    """A value is the piece's text; the label's column holds all right ones, as SQuAD does: ``{text, answer_start}``."""

    name = "span"
    asks = "a span"
    answers = "text"
    metrics = ("squad_f1", "exact_match")
    fields = {"context": True}  # noqa: RUF012
    head = SpanHead()
    spoken = Piece()

    def check(self, task: Task) -> None:
        """The context is one of the texts."""
        if task.context not in task.text:
            raise InvalidValue(f"`{task.name}` has the context `{task.context}`, which is none of its texts ({', '.join(task.text)}).")

    def is_withheld(self, task: Task, rows: Sequence[Row]) -> list[bool]:
        """Rows without an answer: kept back, or impossible."""
        return [empty or not row[task.label]["text"] for empty, row in zip(super().is_withheld(task, rows), rows, strict=True)]

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the answers, each with the place where the context has it nearest to what the source says."""
        context, answers = text_of(row[task.context]), row[task.label]
        starts = [_place(context, str(text), int(start)) for text, start in zip(answers["text"], answers["answer_start"], strict=True)]
        return answered(task, row, {"text": [str(text) for text in answers["text"]], "answer_start": starts})

    def reference(self, task: Task, row: Row) -> list[str]:
        """All right pieces."""
        return list(row[task.label]["text"])

    def perfect(self, task: Task, row: Row) -> str:
        """The first right piece."""
        return str(row[task.label]["text"][0])

    def constant(self, task: Task, rows: Sequence[Row]) -> str:
        """Nothing at all: no piece is common to many contexts."""
        return ""


def _place(context: str, text: str, start: int) -> int:
    """Where ``text`` stands nearest to ``start``; -1 where it does not stand at all."""
    if context[start : start + len(text)] == text:
        return start
    before, behind = context.rfind(text, 0, max(start, 0) + len(text)), context.find(text, max(start, 0))
    return min((one for one in (before, behind) if one >= 0), key=lambda one: abs(one - start), default=-1)


def _answer(task: Task, row: Row) -> tuple[int, int]:
    """First character of the first answer that the context has, and the one behind its last; none is (0, 0)."""
    for text, start in zip(row[task.label]["text"], row[task.label]["answer_start"], strict=True):
        if start >= 0:
            return start, start + len(text.rstrip())
    return 0, 0


def _around(
    framing: HeadFraming, question: list[int], ids: list[int], places: Sequence[tuple[int, int]], room: int, begin: int, end: int
) -> Features:
    """The window that has the answer in its middle, with ``labels``."""
    first = next((index for index, (_, behind) in enumerate(places) if behind > begin), 0)
    last = max((index for index, (before, _) in enumerate(places) if before < end), default=first)
    start = min(max((first + last - room) // 2, 0), max(len(ids) - room, 0))
    feature = _window(framing, question, ids, start, room)
    most = feature["begin"] + feature["count"] - 1
    feature["labels"] = [min(max(place - start + feature["begin"], feature["begin"]), most) for place in (first, max(last, first))]
    return feature


def _window(framing: HeadFraming, question: list[int], ids: list[int], first: int, room: int) -> Features:
    """Question and a stretch of the context, and where the latter lies."""
    stretch = ids[first : first + room]
    feature, begin = framing.inputs.joined(question, stretch)
    return {**feature, "begin": begin, "count": len(stretch), "first": first}


task_types.register("span")(Span())
