"""The text-to-text framing: template -> prompt, answer -> words, and exact scores of the words where all answers are known."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.tasks.collector import collector_held
from deltatune.tasks.framing import Answer, Framing, How, Judge, framings
from deltatune.tasks.metrics import compute
from deltatune.tasks.prompts import Prompts, chosen, distinct, special_tokens
from deltatune.tasks.rows import Row
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template
from deltatune.tasks.tensors import IGNORED, Features, Watch, batched, in_batches, moved, padded, without

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_ANSWER = 128
"""Most tokens of a written answer."""


def _has_template(task: Task) -> bool:
    return bool(task.templates)


class TextToTextFraming(Framing):
    """score(answer | x) = log p(words of the answer | prompt of x) = sum_t log p(w_t | prompt, w_<t).

    A decoder reads prompt and answer as one sequence, with the loss on the answer only; an encoder-decoder reads the
    prompt in its encoder. Texts are cut where the whole is too long, the template and the answer never. Where the
    answers of a task can be listed they are scored; else the model writes, and what it wrote is read.

    Args:
        task: whose rows.
        tokenizer: of the backbone.
        max_length: most tokens of one input.
        template: one of the task's templates by its number, or another one.
        encoder_decoder: the backbone has an encoder of its own.
        manual: with the template; without, the columns stand alone.

    Raises:
        Unsupported: the task has no template, or no label words.
        InvalidValue: there is no template of that number, or it leaves no room for the text.
    """

    name = "text2text"
    fits = staticmethod(_has_template)
    template: Template

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 256,
        *,
        template: int | Template = 0,
        encoder_decoder: bool = False,
        manual: bool = True,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.template = chosen(task, template, manual=manual)
        self.encoder_decoder = encoder_decoder
        self.prompts = Prompts(task, self.template, tokenizer, self.max_length)
        self._before, after = special_tokens(tokenizer)
        self._after = after if encoder_decoder else []  # after a decoder's prompt nothing follows but the answer
        self._known: dict[str, list[int]] = {}
        self.words = self._label_words()
        self._spare = max(map(len, self.words), default=0) + 1

    @classmethod
    def make(cls, task: Task, tokenizer: PreTrainedTokenizerBase, how: How) -> TextToTextFraming:
        """The framing of a backbone with a decoder."""
        how.refuse_packing(cls.name)
        if how.kind == "encoder":
            raise Unsupported("The text2text framing was asked for, but an encoder writes no words. Use the head framing.")
        both = how.kind == "encoder-decoder"
        return cls(task, tokenizer, how.max_length, template=how.template, encoder_decoder=both, manual=how.manual)

    @property
    def auto_class(self) -> str:
        """A causal LM, or a sequence-to-sequence LM for an encoder-decoder."""
        return "AutoModelForSeq2SeqLM" if self.encoder_decoder else "AutoModelForCausalLM"

    @property
    def is_closed(self) -> bool:
        """All answers are known, so they are scored instead of written."""
        return self.task.kind.spoken.is_closed(self.task)

    @property
    def is_single_token(self) -> bool:
        """Every label word is one token, so one forward of the prompt scores all labels exactly."""
        return bool(self.words) and all(len(word) == 1 for word in self.words)

    def _label_words(self) -> list[list[int]]:
        """Tokens of the label words; none where the answers are the rows' own, or free."""
        if not self.is_closed or self.template.verbalizer is None:
            return []
        words = self.task.kind.spoken.options(self.task, self.template, {}) or ()
        tokens = self._tokens_of(words)
        distinct(self.task, dict(zip(words, tokens, strict=True)))
        return tokens

    def _tokens_of(self, answers: Sequence[str]) -> list[list[int]]:
        """Answers as they follow the prompt: after a blank for a decoder, at the beginning for an encoder-decoder."""
        new = list(dict.fromkeys(answer for answer in answers if answer not in self._known))
        tokens = dict(zip(new, self.prompts.tokens(new if self.encoder_decoder else [f" {answer}" for answer in new]), strict=True))
        self._known.update({answer: ids for answer, ids in tokens.items() if len(self._known) < 1000})
        return [self._known.get(answer) or tokens[answer] for answer in answers]

    @collector_held()
    def encode(self, rows: Sequence[Row]) -> list[Features]:
        """Decoder: prompt + answer + end, ``labels`` -100 on the prompt. Encoder-decoder: the prompt; ``labels`` the answer."""
        spoken = self.task.kind.spoken
        said = self._tokens_of([spoken.say(self.task, self.template, row) for row in rows])
        end = self._end()
        answers = [[*ids, *end] for ids in said]
        prompts = self._prompts(rows, [len(answer) for answer in answers])
        if self.encoder_decoder:
            return [{"input_ids": prompt, "labels": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def encode_inputs(self, rows: Sequence[Row]) -> list[Features]:
        """Token ids (length,) of the prompts, short enough for the longest answer to follow; ``options``, where all are known."""
        options = self._options(rows)
        prompts = self._prompts(rows, [max(map(len, known), default=0) + 1 for known in options])
        return [{"input_ids": prompt, "options": known} for prompt, known in zip(prompts, options, strict=True)]

    def _options(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """For each row the tokens of its answers, in the order of their indices; none where they are free."""
        if self.words or not self.is_closed:
            return [self.words] * len(rows)
        options = [self.task.kind.spoken.options(self.task, self.template, row) or () for row in rows]
        tokens = iter(self._tokens_of([answer for known in options for answer in known]))
        return [[next(tokens) for _ in known] for known in options]

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (batch, length) and, where there are any, ``labels`` (batch, length or answer)."""
        return batched(features, self.tokenizer.pad_token_id)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], weights: Tensor | None = None) -> Tensor:
        """-sum_t log p(w_t | prompt, w_<t) over the answers' tokens."""
        if self.encoder_decoder:
            return _cross_entropy(model(**batch).logits, batch["labels"])  # labels make the decoder's inputs
        return next_tokens(model, batch)

    def score(self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, watch: Watch = iter) -> Tensor:
        """Log-probabilities of the answers, log p(answer | prompt): (rows, most answers)."""
        if not self.is_closed:
            raise Unsupported(f"The task `{self.task.name}` has no label words to score. Generate its answers instead.")
        inputs = self.encode_inputs(rows)
        found: list[Tensor] = [torch.empty(0)] * len(inputs)
        for batch in in_batches(model, inputs, batch_size, watch):
            for index, scores in zip(batch, self._scores(model, [inputs[index] for index in batch]), strict=True):
                found[index] = scores.float().cpu()
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-torch.inf) if found else torch.empty(0, self.task.outputs)

    def score_batch(self, model: nn.Module, inputs: Sequence[Features]) -> Tensor:
        """The same for one batch of encoded inputs."""
        return torch.stack(self._scores(model, inputs))

    def answers(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
    ) -> list[Answer]:
        """The likeliest of the known answers, or what the model writes."""
        task = self.task
        if self.is_closed:
            scored = self.score(model, rows, batch_size, watch)
            return [Answer(int(scores.argmax()), task.kind.shares(task, row, scores)) for row, scores in zip(rows, scored, strict=True)]
        texts = write(self, model, rows, batch_size, most, watch)
        return [Answer(task.kind.spoken.understand(task, self.template, row, text), {}) for row, text in zip(rows, texts, strict=True)]

    def judged(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int = 32, by: Judge = compute, watch: Watch = iter
    ) -> dict[str, Any]:
        """As every framing; answers are written as long as the longest right one, and no longer."""
        said = self.answers(model, rows, batch_size, self._longest(rows), watch)
        return by(self.task.metrics, [answer.value for answer in said], self.references(rows), rows)

    def _longest(self, rows: Sequence[Row]) -> int | None:
        """Tokens of the longest right answer and its end; None where the answers are known and none is written."""
        if self.is_closed:
            return None
        said = self._tokens_of([self.task.kind.spoken.say(self.task, self.template, row) for row in rows])
        return max(map(len, said), default=0) + 2

    @classmethod
    def shown(cls, task: Task, row: Row) -> list[tuple[str, str]]:
        """The prompt and the right answer of each template."""
        return [(template.render(row), task.kind.spoken.say(task, template, row)) for template in task.templates]

    def _scores(self, model: nn.Module, inputs: Sequence[Features]) -> list[Tensor]:
        """For each input the log-probabilities of its answers."""
        if not self.encoder_decoder and all(len(word) == 1 for feature in inputs for word in feature["options"]):
            return self._score_first(model, inputs)
        pairs = [(feature["input_ids"], word) for feature in inputs for word in feature["options"]]
        scores = (self._score_answers if self.encoder_decoder else self._score_joined)(model, pairs)
        counts = [len(feature["options"]) for feature in inputs]
        return [scores[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]

    def _score_first(self, model: nn.Module, inputs: Sequence[Features]) -> list[Tensor]:
        """One forward per prompt: the distribution after its last token holds every answer of one token."""
        last = torch.tensor([len(feature["input_ids"]) - 1 for feature in inputs])
        logits = self._logits(model, [feature["input_ids"] for feature in inputs], last[:, None])[:, 0]
        shares = logits.float().log_softmax(-1)
        return [row[[word[0] for word in feature["options"]]] for row, feature in zip(shares, inputs, strict=True)]

    def _score_joined(self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """One forward per prompt and word; the token at position p is predicted at p - 1. (pairs,)."""
        longest = max(len(word) for _, word in pairs)
        positions = torch.tensor(
            [[min(len(prompt) - 1 + step, len(prompt) + len(word) - 2) for step in range(longest)] for prompt, word in pairs]
        )
        logits = self._logits(model, [prompt + word for prompt, word in pairs], positions)
        return _summed(logits, [word for _, word in pairs])

    def _score_answers(self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """An encoder-decoder, with the words as the decoder's targets. (pairs,)."""
        batch = self.collate([{"input_ids": prompt, "labels": word} for prompt, word in pairs])
        return _summed(model(**moved(batch, model)).logits, [word for _, word in pairs])

    def _logits(self, model: nn.Module, sequences: Sequence[list[int]], positions: Tensor) -> Tensor:
        """Logits (batch, k, vocabulary) at ``positions`` (batch, k); the vocabulary is spread out at no other place where the model can."""
        batch = moved(self.collate([{"input_ids": ids} for ids in sequences]), model)
        kept, place = torch.unique(positions, return_inverse=True)
        rows = torch.arange(len(sequences))[:, None]
        if keeps_logits(model):
            logits: Tensor = model(**batch, logits_to_keep=kept.to(batch["input_ids"].device)).logits
            return logits[rows.to(logits.device), place.to(logits.device)]
        logits = model(**batch).logits
        return logits[rows.to(logits.device), positions.to(logits.device)]

    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def _prompts(self, rows: Sequence[Row], answers: Sequence[int]) -> list[list[int]]:
        """The prompts' tokens, each leaving a decoder room for an answer of so many tokens."""
        whole = self.max_length - len(self._before) - len(self._after)
        rooms = [whole if self.encoder_decoder else whole - max(answer, self._spare) for answer in answers]
        return [[*self._before, *body, *self._after] for body in self.prompts.encode(rows, rooms)]


def next_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """-sum log p(w_t | w_<t) over the tokens of ``labels`` (batch, length) that count."""
    inputs: dict[str, Any] = without(batch)
    if "position_ids" in inputs:  # with a cache, transformers does not look for packed texts
        inputs["use_cache"] = False
    targets = batch["labels"][:, 1:]  # (batch, length - 1): the token behind each place
    if keeps_logits(model):
        places = targets.ne(IGNORED).any(0).nonzero().flatten()
        return _cross_entropy(model(**inputs, logits_to_keep=places).logits, targets[:, places])
    return _cross_entropy(model(**inputs).logits[:, :-1], targets)


def write(
    framing: Framing, model: Any, rows: Sequence[Row], batch_size: int = 32, most: int | None = None, watch: Watch = iter
) -> list[str]:
    """What a model writes behind each row's input, greedily, up to ``most`` tokens.

    Inputs of unequal length are padded in front for a decoder, so that each answer begins where its prompt ends.
    """
    from transformers import GenerationConfig

    tokenizer, front = framing.tokenizer, framing.auto_class != "AutoModelForSeq2SeqLM"
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=min(most or LONGEST_ANSWER, LONGEST_ANSWER),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    inputs = framing.encode_inputs(rows)
    written = [""] * len(inputs)
    for chosen_rows in in_batches(model, inputs, batch_size, watch):
        batch = _padded([inputs[index]["input_ids"] for index in chosen_rows], tokenizer.pad_token_id or 0, front=front)
        tokens = model.generate(**moved(batch, model), generation_config=config, use_cache=True)
        new = tokens[:, batch["input_ids"].shape[1] :] if front else tokens
        for index, text in zip(chosen_rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            written[index] = text.strip()
    return written


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can spread out the vocabulary at chosen places only."""
    kind: Any = type(getattr(model, "module", model))  # DDP passes everything on
    return _keeps_logits(kind)


@cache
def _keeps_logits(kind: Any) -> bool:
    """Asked in every step, and slow to see."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (batch, k, vocabulary), targets (batch, k) -> sum over the targets that count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _summed(logits: Tensor, words: Sequence[list[int]]) -> Tensor:
    """Logits (pairs, longest, vocabulary) at each token's place -> sum of the tokens' log-probabilities (pairs,)."""
    targets = padded(words, IGNORED).to(logits.device)
    found = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != IGNORED)).sum(-1)


def _padded(prompts: Sequence[list[int]], pad: int, *, front: bool) -> dict[str, Tensor]:
    """Ids and mask (batch, longest)."""
    ids, mask = padded([prompt[::-1] if front else prompt for prompt in prompts], pad), padded([[1] * len(prompt) for prompt in prompts], 0)
    return {"input_ids": ids.flip(1) if front else ids, "attention_mask": mask.flip(1) if front else mask}


framings.register("text2text")(TextToTextFraming)
