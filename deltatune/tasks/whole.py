"""Framings of rows that are learnt as wholes by a decoder: plain texts, and chats with the loss on the assistant's turns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.tasks.framing import Answer, Framing, How, Judge, framings
from deltatune.tasks.metrics import compute
from deltatune.tasks.rows import Row
from deltatune.tasks.task import Task
from deltatune.tasks.tensors import IGNORED, Features, Watch, batched, in_batches, moved, padded
from deltatune.tasks.text2text import next_tokens, write
from deltatune.tasks.types.whole import ASSISTANT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _is_plain(task: Task) -> bool:
    return task.kind.words == "plain"


def _is_chat(task: Task) -> bool:
    return task.kind.words == "chat"


class WholeFraming(Framing):
    """l = -sum_t log p(w_t | w_<t) over the tokens that are learnt.

    With packing, an example holds as many rows as fit; their positions begin anew, by which transformers keeps them from
    seeing each other, so the loss is that of the rows alone.

    Args:
        task: whose rows.
        tokenizer: of the backbone.
        max_length: most tokens of an example.
        packing: several rows an example.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, *, packing: bool = False) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.packing = packing

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> WholeFraming:
        """The framing of a decoder, which takes no template."""
        if how.template or not how.manual:
            raise InvalidValue(f"A template was asked for, but `{task.name}` is learnt as it stands. Leave `template` out.")
        if how.kind != "decoder":
            raise Unsupported(f"`{task.name}` is learnt token by token, which a decoder can; the backbone is an {how.kind}.")
        return cls(task, tokenizer, how.max_length, packing=how.packing)

    @property
    def auto_class(self) -> str:
        """A causal LM."""
        return "AutoModelForCausalLM"

    @abstractmethod
    def sequences(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """A row as one or more (tokens, labels), each at most ``max_length`` long."""

    @abstractmethod
    def begun(self, row: Row) -> list[int]:
        """The tokens behind which the model writes."""

    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Tokens with ``labels``; a long row may give several examples, and with packing an example holds several rows."""
        pieces = [piece for row in rows for piece in self.sequences(row)]
        if not self.packing:
            return [{"input_ids": ids, "labels": labels} for ids, labels in pieces]
        return list(packed(pieces, self.max_length))

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """The tokens behind which the model writes."""
        return [{"input_ids": self.begun(row)} for row in rows]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``attention_mask``, or of packed examples ``position_ids``, all (batch, length)."""
        batch = batched(features, self.tokenizer.pad_token_id)
        if "position_ids" in features[0]:  # each pad token is a text of its own
            del batch["attention_mask"]
            batch["position_ids"] = padded([feature["position_ids"] for feature in features], 0)
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """The sum over the tokens that are learnt."""
        return next_tokens(model, batch)

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Nothing is listed that could be scored."""
        raise Unsupported(f"The task `{self.task.name}` has no answers to choose among. Let the model write.")

    def judged(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, by: Judge = compute, watch: Watch = iter
    ) -> dict[str, Any]:
        """The likelihood of what is learnt."""
        return by(self.task.metrics, self.likelihoods(model, rows, batch_size, watch), self.references(rows), rows)

    def likelihoods(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> list[tuple[float, int]]:
        """For each row the log-probability of what is learnt, and its tokens."""
        pieces = [(place, *piece) for place, row in enumerate(rows) for piece in self.sequences(row)]
        features: list[Features] = [{"input_ids": ids, "labels": labels} for _, ids, labels in pieces]
        sums = [[0.0, 0] for _ in rows]
        for batch in in_batches(model, features, batch_size, watch):
            inputs = moved(self.collate([features[index] for index in batch]), model)
            labels = inputs.pop("labels")[:, 1:]
            shares = model(**inputs).logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            counted = labels.ne(IGNORED)
            for index, total, count in zip(batch, (shares * counted).sum(1).tolist(), counted.sum(1).tolist(), strict=True):
                sums[pieces[index][0]][0] += total
                sums[pieces[index][0]][1] += count
        return [(total, int(count)) for total, count in sums]

    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """What the model writes behind each row."""
        return [Answer(text, {}) for text in write(self, model, rows, batch_size, most, watch)]


class PlainFraming(WholeFraming):
    """A text is learnt from its first token to its end; a long one in pieces."""

    name = "plain"
    fits = staticmethod(_is_plain)

    def sequences(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """Pieces of the text, the last with the end's token."""
        ids = list(self.tokenizer(str(row[self.task.label]))["input_ids"])
        end = self.tokenizer.eos_token_id
        ids += [] if end is None or ids[-1:] == [end] else [int(end)]
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [(piece, [IGNORED, *piece[1:]]) for piece in pieces]  # nothing predicts the first

    def begun(self, row: Row) -> list[int]:
        """The text's last tokens."""
        return list(self.tokenizer(str(row[self.task.text[0]]))["input_ids"])[-self.max_length :]

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """Nothing, then the whole text."""
        return [("", str(row[task.label]))]


class ChatFraming(WholeFraming):
    """A chat in the tokenizer's own template; what is learnt are the assistant's turns with their ends.

    Of a chat that is too long, the oldest tokens are left out.

    Raises:
        Unsupported: the tokenizer has no chat template.
    """

    name = "chat"
    fits = staticmethod(_is_chat)

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, *, packing: bool = False) -> None:
        super().__init__(task, tokenizer, max_length, packing=packing)
        if not getattr(tokenizer, "chat_template", None):
            raise Unsupported(
                f"`{task.name}` holds chats, but {type(tokenizer).__name__} has no chat template. Take an instruction-tuned backbone."
            )

    def sequences(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """The whole chat, labels -100 but for the assistant's turns."""
        turns = row[self.task.label]
        text = self._text(turns)
        spans = [self._span(turns, place, text) for place, turn in enumerate(turns) if turn["role"] == ASSISTANT]
        cuts = sorted({0, len(text), *(place for span in spans for place in span)})
        ids: list[int] = []
        labels: list[int] = []
        for begin, end in pairwise(cuts):  # apart, as the model meets them when it answers
            piece = self.tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if (begin, end) in spans else [IGNORED] * len(piece)
        return [(ids[-self.max_length :], labels[-self.max_length :])]

    def _span(self, turns: Sequence[Mapping[str, str]], place: int, text: str) -> tuple[int, int]:
        """Characters of one turn of the assistant, from what it writes to the end of its turn."""
        before, behind = self._text(turns[:place], begun=True), self._text(turns[: place + 1])
        if not (text.startswith(before) and text.startswith(behind.rstrip())):
            raise DataError(
                f"The chat template of {type(self.tokenizer).__name__} writes earlier turns otherwise once later ones follow, so it cannot "
                "be told what the assistant wrote. Give each chat one turn of the assistant, the last."
            )
        return len(before), len(behind.rstrip())

    def _text(self, turns: Sequence[Mapping[str, str]], *, begun: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, add_generation_prompt=begun))

    def begun(self, row: Row) -> list[int]:
        """The turns so far, and the beginning of the assistant's."""
        text = self._text(row[self.task.label], begun=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[-self.max_length :]

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """The turns before the last one, and the last."""
        *before, last = row[task.label]
        return [("\n".join(f"{turn['role']}: {turn['content']}" for turn in before), last["content"])]


def packed(pieces: Iterable[tuple[list[int], list[int]]], length: int) -> Iterable[Features]:
    """Pieces one behind the other, as many as fit, with positions that begin anew; what is first in a piece is not learnt.

    >>> [one] = packed([([5, 6], [5, 6]), ([7, 8], [-100, 8])], 8)
    >>> one["input_ids"], one["position_ids"], one["labels"]
    ([5, 6, 7, 8], [0, 1, 0, 1], [-100, 6, -100, 8])
    """
    example: Features = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels in pieces:
        if example["input_ids"] and len(example["input_ids"]) + len(ids) > length:
            yield example
            example = {"input_ids": [], "labels": [], "position_ids": []}
        example["input_ids"] += ids
        example["labels"] += [IGNORED, *labels[1:]]
        example["position_ids"] += range(len(ids))
    if example["input_ids"]:
        yield example


framings.register("plain")(PlainFraming)
framings.register("chat")(ChatFraming)
