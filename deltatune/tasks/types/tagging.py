"""Tagging: a tag a word, as in named entities and slots; spans of words are what counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import DataError, InvalidValue, nearest
from deltatune.tasks.rows import Row
from deltatune.tasks.tensors import IGNORED, Features, moved, without
from deltatune.tasks.types.base import Asking, Head, Spoken, TaskType, answered, label_index, task_types
from deltatune.tasks.types.multilabel import NOTHING

if TYPE_CHECKING:
    from deltatune.tasks.framing import HeadFraming
    from deltatune.tasks.task import Task
    from deltatune.tasks.template import Template

OUTSIDE = "O"


@dataclass(frozen=True)
class Tags:
    """The tags of one row. What was named but is not in the row stands behind its words, as further tags."""

    tags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.tags)


class TaggingHead(Head):
    """l = -sum_w log softmax(logits_w)_(tag of w), read at the first token of each word w."""

    auto_class = "AutoModelForTokenClassification"

    def encode(self, framing: HeadFraming, rows: Sequence[Row], *, labelled: bool) -> list[Features]:
        """Token ids, ``firsts``: the place of each word's first token (-1 of words that were cut off), and ``labels`` (length,)."""
        [column] = framing.task.text
        features = framing.inputs.tokens(rows, framing.task.text, offsets=True)
        for feature, row in zip(features, rows, strict=True):
            feature["firsts"] = _firsts(row[column], feature.pop("offsets"))
            if labelled:
                feature["labels"] = [IGNORED] * len(feature["input_ids"])
                for place, tag in zip(feature["firsts"], row[framing.task.label], strict=True):
                    if place >= 0:
                        feature["labels"][place] = tag
        return features

    def collate(self, framing: HeadFraming, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and, where there are any, ``labels``, all (batch, length)."""
        batch = framing.inputs.padded(features)
        if "labels" in features[0]:
            length = batch["input_ids"].shape[1]
            batch["labels"] = torch.tensor([[*one["labels"], *[IGNORED] * (length - len(one["labels"]))] for one in features])
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of the words' first tokens."""
        logits = model(**without(batch)).logits.float()  # (batch, length, tags)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")

    def scores(self, framing: HeadFraming, model: nn.Module, features: Sequence[Features]) -> list[Tensor]:
        """Logits (length, tags) of each row."""
        logits = model(**moved(self.collate(framing, features), model)).logits.float().cpu()
        return [row[: len(feature["input_ids"])] for row, feature in zip(logits, features, strict=True)]

    def value(self, framing: HeadFraming, features: Features, scores: Tensor) -> Tags:
        """Each word's likeliest tag; outside where the word was cut off."""
        said = scores.argmax(-1).tolist()
        return Tags(tuple(OUTSIDE if place < 0 else framing.task.labels[said[place]] for place in features["firsts"]))


class NamedSpans(Spoken):
    """``kind: span; kind: span``, in the order of the text, or ``none``."""

    def worded(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The kinds of span."""
        return span_kinds(labels)

    def say(self, task: Task, template: Template, row: Row) -> str:
        """The spans with their kinds."""
        kinds, words = kinds_of(task, template), row[task.text[0]]
        tags = [task.labels[tag] for tag in row[task.label]]
        return "; ".join(f"{kinds[kind]}: {' '.join(words[first:end])}" for kind, first, end in spans_of(tags)) or NOTHING

    def understand(self, task: Task, template: Template, row: Row, text: str) -> Tags:
        """Each span goes to the first place where its words stand and are free; what stands nowhere counts as named wrongly."""
        kinds = {word.lower(): kind for kind, word in kinds_of(task, template).items()}
        words = [str(word) for word in row[task.text[0]]]
        tags, beyond = [OUTSIDE] * len(words), []
        for part in text.split(";"):
            said, _, span = part.partition(":")
            kind, wanted = kinds.get(" ".join(said.lower().split())), span.split()
            if kind is None or not wanted:
                continue
            place, named = _free_place(words, wanted, tags), [f"B-{kind}", *[f"I-{kind}"] * (len(wanted) - 1)]
            if place is None:
                beyond.extend(named)
            else:
                tags[place : place + len(wanted)] = named
        return Tags((*tags, *beyond))


def _free_place(words: Sequence[str], wanted: Sequence[str], tags: Sequence[str]) -> int | None:
    """The first place where the wanted words stand untagged, in this spelling or else in any case."""
    size = len(wanted)
    for spelling in (str, str.lower):
        there, sought = [spelling(word) for word in words], [spelling(word) for word in wanted]
        for place in range(len(words) - size + 1):
            if there[place : place + size] == sought and set(tags[place : place + size]) == {OUTSIDE}:
                return place
    return None


class Words(Asking):
    """The words of a text: as a list, or with blanks between them."""

    def given(self, task: Task, parts: Sequence[str]) -> Row:
        """A text's words."""
        return self.asked(task, super().given(task, parts))

    def asked(self, task: Task, row: Row) -> Row:
        """The list of words."""
        words = row.get(task.text[0], "")
        return {task.text[0]: words.split() if isinstance(words, str) else [str(word) for word in words]}


class Tagging(TaskType):
    """A value is a row's tags; ``text`` is the one column that lists the words, ``labels`` the tags: O, B-KIND, I-KIND."""

    name = "tagging"
    asks = "spans"
    answers = "tags"
    metrics = ("span_f1",)
    fields = {"labels": True, "words": False}  # noqa: RUF012
    head = TaggingHead()
    spoken = NamedSpans()
    asking = Words()
    speaks = False

    def check(self, task: Task) -> None:
        """One column of words, tags of the B-I-O kind."""
        if len(task.text) != 1:
            raise InvalidValue(f"The task `{task.name}` has {len(task.text)} text columns; tagging takes the one that lists the words.")
        odd = [label for label in task.labels if label != OUTSIDE and not re.match(r"[BI]-.", label)]
        if OUTSIDE not in task.labels or odd or len(task.labels) < 2:
            named = f"the tag `{odd[0]}`" if odd else "no tag `O`"
            raise InvalidValue(f"The task `{task.name}` has {named}. Tags are `O`, and `B-KIND` and `I-KIND` for each kind of span.")

    def encode(self, task: Task, row: Row, names: Sequence[str]) -> Row:
        """With the tags' indices, as many as there are words."""
        words, tags = row[task.text[0]], row[task.label]
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise DataError(f"A row of `{task.name}` has no list of words in `{task.text[0]}` with as many tags in `{task.label}`.")
        return answered(task, row, [label_index(task, tag, names) for tag in tags])

    def reference(self, task: Task, row: Row) -> Tags:
        """The tags by name."""
        return Tags(tuple(task.labels[tag] for tag in row[task.label]))

    def constant(self, task: Task, rows: Sequence[Row]) -> Tags:
        """No span at all."""
        return Tags(())

    def named(self, task: Task, row: Row, value: Any) -> list[str]:
        """The spans with their kinds."""
        words = [*row[task.text[0]]]
        return [f"{kind}: {' '.join(map(str, words[first:end]))}" for kind, first, end in spans_of(value.tags) if end <= len(words)]


def kinds_of(task: Task, template: Template) -> dict[str, str]:
    """Kind of span -> its word, in the order of the tags."""
    kinds = span_kinds(task.labels)
    words = template.verbalizer.words if template.verbalizer else kinds
    if len(words) != len(kinds):
        raise InvalidValue(f"A template of `{task.name}` has {len(words)} words for {len(kinds)} kinds of span. {nearest('', kinds)}")
    return dict(zip(kinds, words, strict=True))


def span_kinds(labels: Sequence[str]) -> tuple[str, ...]:
    """The kinds among tags, each once.

    >>> span_kinds(["O", "B-PER", "I-PER", "B-LOC"])
    ('PER', 'LOC')
    """
    return tuple(dict.fromkeys(label[2:] for label in labels if label != OUTSIDE))


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, word behind the last) of each span; an I without a beginning begins one.

    >>> spans_of(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    spans: list[tuple[str, int, int]] = []
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        goes_on = tag.startswith("I-") and spans and spans[-1][0] == tag[2:] and spans[-1][2] == place
        if goes_on:
            spans[-1] = (tag[2:], spans[-1][1], place + 1)
        else:
            spans.append((tag[2:], place, place + 1))
    return spans


def _firsts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each word the place of its first token, -1 where it has none; the words are joined by blanks.

    Some tokenizers count the blank in front of a word to its first token, so a token belongs to the word that holds its end.
    """
    ends, end = [], -1
    for text in words:
        end += len(str(text)) + 1
        ends.append(end)
    firsts, word = [-1] * len(ends), 0
    for place, (before, behind) in enumerate(offsets):
        while word < len(ends) and ends[word] < behind:
            word += 1
        if behind > before and word < len(ends) and firsts[word] < 0:  # special tokens have no extent
            firsts[word] = place
    return firsts


task_types.register("tagging")(Tagging())
