"""The text-to-text framing: template -> prompt, label -> word, and exact scores of the words under a language model."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltatune.errors import DataError, InvalidValue, Unsupported
from deltatune.tasks.framing import IGNORED, Features, Framing, moved, padded
from deltatune.tasks.rows import Row, Rows
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextToTextFraming(Framing):
    """score(label | x) = log p(word of label | prompt of x) = sum_t log p(w_t | prompt, w_<t).

    A decoder reads prompt and answer as one sequence, with the loss on the answer only; an encoder-decoder reads the
    prompt in its encoder. Texts are cut where the whole is too long, the template and the answer never.

    Raises:
        Unsupported: the task has no template with a verbalizer, or its type has no words.
        InvalidValue: there is no template of that number, or it leaves no room for the text.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 256,
        *,
        template: int | Template = 0,
        encoder_decoder: bool = False,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.template = _chosen(task, template)
        self.encoder_decoder = encoder_decoder
        self._before, self._after = _special_tokens(tokenizer, encoder_decoder)
        self.words = [self._answer(word) for word in self.template.verbalizer.words] if self.template.verbalizer else []
        self._check_words()
        self._spare = max(map(len, self.words), default=0) + 1

    @property
    def auto_class(self) -> str:
        """A causal LM, or a sequence-to-sequence LM for an encoder-decoder."""
        return "AutoModelForSeq2SeqLM" if self.encoder_decoder else "AutoModelForCausalLM"

    @property
    def is_single_token(self) -> bool:
        """Every label word is one token, so one forward of the prompt scores all labels exactly."""
        return bool(self.words) and all(len(word) == 1 for word in self.words)

    def encode(self, rows: Rows) -> list[Features]:
        """Decoder: prompt + answer + end, ``labels`` -100 on the prompt. Encoder-decoder: the prompt; ``labels`` the answer."""
        answers = [[*(self.words[label] if self.words else self._answer(str(label))), *self._end()] for label in rows[self.task.label]]
        prompts = self._prompts(rows, [len(answer) for answer in answers])
        if self.encoder_decoder:
            return [{"input_ids": prompt, "labels": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids (length,) of the prompts, short enough for the longest label word to follow."""
        return [{"input_ids": prompt} for prompt in self._prompts(rows, [self._spare] * len(rows))]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (batch, length) and, where there are any, ``labels`` (batch, length or answer)."""
        ids = [feature["input_ids"] for feature in features]
        batch = {"input_ids": padded(ids, self.tokenizer.pad_token_id), "attention_mask": padded([[1] * len(one) for one in ids], 0)}
        if "labels" in features[0]:
            batch["labels"] = padded([feature["labels"] for feature in features], IGNORED)
        return batch

    def score_batch(self, model: nn.Module, inputs: Sequence[Features]) -> Tensor:
        """Log-probabilities of the label words, log p(word | prompt): (batch, labels)."""
        if not self.words:
            raise Unsupported(f"The task `{self.task.name}` has no label words to score. Generate its answers instead.")
        if self.encoder_decoder:
            return self._score_answers(model, [(feature["input_ids"], word) for feature in inputs for word in self.words])
        if self.is_single_token:
            return self._score_first(model, [feature["input_ids"] for feature in inputs])
        return self._score_joined(model, [(feature["input_ids"], word) for feature in inputs for word in self.words])

    def _score_first(self, model: nn.Module, prompts: Sequence[list[int]]) -> Tensor:
        """One forward per prompt: the distribution after its last token holds every word."""
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        logits = self._logits(model, prompts, last[:, None])[:, 0]
        words = torch.tensor([word[0] for word in self.words], device=logits.device)
        return logits.float().log_softmax(-1)[:, words]

    def _score_joined(self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """One forward per prompt and word; the token at position p is predicted at p - 1."""
        longest = max(len(word) for _, word in pairs)
        positions = torch.tensor(
            [[min(len(prompt) - 1 + step, len(prompt) + len(word) - 2) for step in range(longest)] for prompt, word in pairs]
        )
        logits = self._logits(model, [prompt + word for prompt, word in pairs], positions)
        return self._summed(logits, [word for _, word in pairs])

    def _score_answers(self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """An encoder-decoder, with the words as the decoder's targets."""
        batch = self.collate([{"input_ids": prompt, "labels": word} for prompt, word in pairs])
        logits = model(**moved(batch, model)).logits
        return self._summed(logits, [word for _, word in pairs])

    def _summed(self, logits: Tensor, words: Sequence[list[int]]) -> Tensor:
        """Logits (pairs, longest, vocabulary) at each token's place -> sum of the tokens' log-probabilities (batch, labels)."""
        targets = padded(words, IGNORED).to(logits.device)
        chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (chosen * (targets != IGNORED)).sum(-1).view(-1, len(self.words))

    def _logits(self, model: nn.Module, sequences: Sequence[list[int]], positions: Tensor) -> Tensor:
        """Logits (batch, k, vocabulary) at ``positions`` (batch, k); the vocabulary is spread out at no other place where the model can."""
        batch = moved(self.collate([{"input_ids": ids} for ids in sequences]), model)
        kept, place = torch.unique(positions, return_inverse=True)
        rows = torch.arange(len(sequences))[:, None]
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits: Tensor = model(**batch, logits_to_keep=kept.to(batch["input_ids"].device)).logits
            return logits[rows.to(logits.device), place.to(logits.device)]
        logits = model(**batch).logits
        return logits[rows.to(logits.device), positions.to(logits.device)]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _answer(self, word: str) -> list[int]:
        """A word as it follows the prompt: after a blank for a decoder, at the beginning for an encoder-decoder."""
        return self._tokens([word if self.encoder_decoder else f" {word}"])[0]

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def _check_words(self) -> None:
        verbalizer = self.template.verbalizer
        for index, word in enumerate(self.words):
            if not word or word in self.words[:index]:
                named = verbalizer.words[index] if verbalizer else ""
                raise InvalidValue(
                    f"The label word `{named}` of `{self.task.name}` is the same to this tokenizer as another one. Choose other words."
                )

    def _prompts(self, rows: Sequence[Row], answers: Sequence[int]) -> list[list[int]]:
        """The prompts' tokens, each leaving a decoder room for an answer of so many tokens."""
        if not len(rows):
            return []
        whole = self.max_length - len(self._before) - len(self._after)
        rooms = [whole if self.encoder_decoder else whole - max(answer, self._spare) for answer in answers]
        bodies = self._tokens([self.template.render(row) for row in rows])
        self._shorten(rows, bodies, rooms)
        return [[*self._before, *body, *self._after] for body in bodies]

    def _shorten(self, rows: Sequence[Row], bodies: list[list[int]], rooms: Sequence[int]) -> None:
        """Cut the texts of the rows that are too long, in place; again where the cut text has more tokens than its parts had."""
        long = [index for index, room in enumerate(rooms) if len(bodies[index]) > room]
        texts = dict(zip(long, self._texts([rows[index] for index in long]), strict=True))
        while long:
            fits = [texts[index].shorten(len(bodies[index]) - rooms[index]) for index in long]
            if not all(fits):
                raise InvalidValue(
                    f"The template of `{self.task.name}` and its answer need more than {self.max_length} tokens alone. Raise `max_length`."
                )
            cut = self._tokens([self.template.render(texts[index].values()) for index in long])
            for index, body in zip(long, cut, strict=True):
                bodies[index] = body
            long = [index for index in long if len(bodies[index]) > rooms[index]]

    def _texts(self, rows: Sequence[Row]) -> list[_Texts]:
        columns = self.template.columns
        texts = [str(row[column]).strip() for row in rows for column in columns]
        if not texts:
            return []
        spans = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends = [[end for _, end in span] for span in spans]
        width = len(columns)
        return [
            _Texts(
                dict(zip(columns, texts[start : start + width], strict=True)), dict(zip(columns, ends[start : start + width], strict=True))
            )
            for start in range(0, len(texts), width)
        ]


class _Texts:
    """The texts of one row while they are cut: where the characters of each token end, and how many tokens are kept."""

    def __init__(self, texts: Mapping[str, str], ends: Mapping[str, Sequence[int]]) -> None:
        self.texts = texts
        self.ends = ends
        self.kept = {column: len(places) for column, places in ends.items()}

    def shorten(self, excess: int) -> bool:
        """Take ``excess`` tokens away, from the longest text first; False if that leaves nothing."""
        room = sum(self.kept.values()) - excess
        level = bisect.bisect_right(range(max(self.kept.values()) + 1), room, key=self._within) - 1
        spare = room - self._within(level)
        for column in sorted(self.kept, key=self.kept.__getitem__, reverse=True):
            more = 1 if self.kept[column] > level and spare > 0 else 0
            self.kept[column] = min(self.kept[column], level) + more
            spare -= more
        return room > 0

    def values(self) -> dict[str, str]:
        """The texts as they are cut now."""
        return {column: self._cut(column, length) for column, length in self.kept.items()}

    def _within(self, level: int) -> int:
        return sum(min(length, level) for length in self.kept.values())

    def _cut(self, column: str, length: int) -> str:
        ends = self.ends[column]
        return self.texts[column] if length >= len(ends) else self.texts[column][: ends[length - 1] if length else 0].rstrip()


def _chosen(task: Task, template: int | Template) -> Template:
    if isinstance(template, Template):
        template.check_columns(task.text)
        chosen = template
    elif not task.templates:
        raise Unsupported(f"The task `{task.name}` has no template. Give one, or use the head framing.")
    elif not 0 <= template < len(task.templates):
        raise InvalidValue(f"The task `{task.name}` has {len(task.templates)} templates, numbered from 0; {template} was asked for.")
    else:
        chosen = task.templates[template]
    if task.type == "classification" and chosen.verbalizer is None:
        raise Unsupported(
            f"The template {chosen.prompt!r} has no label words for `{task.name}`. Give it a verbalizer, or use the head framing."
        )
    if task.type in ("multilabel", "regression"):
        raise Unsupported(f"The text2text framing of a {task.type} task (`{task.name}`) is not defined. Use the head framing.")
    return chosen


def _special_tokens(tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text; after a decoder's prompt nothing follows but the answer."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    start = next((index for index in range(len(full)) if full[index : index + len(bare)] == bare), None)
    if start is None:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} changes a text's tokens when it adds special ones, so prompts cannot be cut safely."
        )
    return full[:start], full[start + len(bare) :] if encoder_decoder else []
