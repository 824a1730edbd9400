"""Prompt tuning: virtual tokens in front of the input embeddings (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue
from deltatune.methods.addition.text_stack import table_shape, token_embedding
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, PromptPatch, methods
from deltatune.structure.site import Site

Init = Literal["vocabulary", "random", "labels", "text"]

_WORDS = ("labels", "text")
_CHUNK = 4096


@methods.register("prompt-tuning")
@dataclass(frozen=True)
class PromptTuning(Method):
    """X <- [P; X] with P: (num_virtual_tokens, hidden) in front of the text's embeddings X, at the encoder where there is one.

    Trains P. It starts from ``init_ids``, and from ``init`` where they end. ``init="labels"`` and ``init="text"`` are
    written in words, and which tokens are words is the tokenizer's to say: ``dt.train`` turns all three, frequent tokens
    too, into ``init_ids``, and so does ``spell`` in a loop of your own.

    Args:
        num_virtual_tokens: p.
        init: ``vocabulary`` starts from the embeddings of frequent tokens, ``random`` from U[-init_range, init_range],
            ``labels`` from the label words (the mean of a word's tokens, as many words as there is room for) and
            frequent tokens, ``text`` from ``init_text`` and frequent tokens.
        init_range: half the width of the random start.
        init_vocabulary: how many frequent tokens there are to draw from, 5,000 as in the paper. ``spell`` draws among the first
            so many that are whole words; without a tokenizer these are simply the ids below it, which is right where a
            vocabulary begins with its commonest words: BERT's begins with a thousand unused entries and as many characters.
        init_ids: tokens whose embeddings come first.
        init_lengths: how many of ``init_ids``, in their order, are averaged into each virtual token; 1 if left out.
        init_text: a text, such as an instruction, for ``init="text"``.
        seen_by_decoder: the decoder behind an encoder attends to the encoder's outputs at the virtual tokens, too, so that
            these stay in the outputs; else they are cut off.

    Raises:
        InvalidValue: a field out of its range, or fields that contradict each other.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("stack", "!decoder.stack?")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-2
    source: ClassVar[str] = "arXiv:2104.08691"

    num_virtual_tokens: int = 100
    init: Init = "vocabulary"
    init_range: float = 0.5
    init_vocabulary: int = 5000
    init_ids: tuple[int, ...] = ()
    init_lengths: tuple[int, ...] = ()
    init_text: str = ""
    seen_by_decoder: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "init_range", "init_vocabulary")
        one_of(self, "init", get_args(Init))
        if (self.init == "text") != bool(self.init_text):
            raise InvalidValue(
                f"PromptTuning(init={self.init!r}, init_text={self.init_text!r}) was asked for. Give `init_text` with init='text', "
                "and with nothing else."
            )
        if self.init_ids and self.init in _WORDS:
            raise InvalidValue(f"PromptTuning(init={self.init!r}) finds its tokens itself. Give either `init_ids` or `init={self.init!r}`.")
        if self.init_lengths and (sum(self.init_lengths) != len(self.init_ids) or min(self.init_lengths) < 1):
            raise InvalidValue(
                f"PromptTuning(init_lengths={self.init_lengths}) does not cut {len(self.init_ids)} tokens into spans. "
                "Give positive lengths that add up to the number of `init_ids`."
            )
        if len(self._lengths) > self.num_virtual_tokens:
            raise InvalidValue(
                f"PromptTuning(init_ids=...) was given {len(self._lengths)} tokens for {self.num_virtual_tokens} virtual ones. "
                "Give fewer, or raise `num_virtual_tokens`."
            )

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.init_lengths or (1,) * len(self.init_ids)

    def spell(self, tokenizer: Any, labels: Sequence[str]) -> PromptTuning:
        """The recipe with the ids of its words in ``init_ids``, frequent ones drawn by torch's generator.

        Args:
            tokenizer: the backbone's, as of transformers.
            labels: the words of the task's labels.

        Raises:
            InvalidValue: a task without labels, a word without tokens, or a text longer than the prompt.
        """
        given = self._given(tokenizer, labels)
        missing = self.num_virtual_tokens - len(given._lengths)
        frequent = frequent_words(tokenizer, self.init_vocabulary) if missing and given.init == "vocabulary" else []
        if not frequent:
            return given
        drawn = [frequent[k] for k in torch.randint(len(frequent), (missing,)).tolist()]
        lengths = (*given.init_lengths, *(1 for _ in drawn)) if given.init_lengths else ()
        return replace(given, init_ids=(*given.init_ids, *drawn), init_lengths=lengths)

    def _given(self, tokenizer: Any, labels: Sequence[str]) -> PromptTuning:
        """The recipe with the ids of the words that it names."""
        if self.init not in _WORDS:
            return self
        if self.init == "text":
            ids = tuple(tokenizer(self.init_text, add_special_tokens=False)["input_ids"])
            return replace(self, init="vocabulary", init_text="", init_ids=ids)
        if not labels:
            raise InvalidValue("PromptTuning(init='labels') was asked for a task without labels. Use init='vocabulary' or init='text'.")
        words = [_tokens(tokenizer, label) for label in labels[: self.num_virtual_tokens]]
        lengths, ids = tuple(map(len, words)), tuple(token for word in words for token in word)
        return replace(self, init="vocabulary", init_ids=ids, init_lengths=lengths)

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prompt a text stack.

        Raises:
            InvalidValue: the recipe is still written in words, or names a token outside the vocabulary.
            Unsupported: no text stack.
        """
        if self.init in _WORDS:
            raise InvalidValue(
                f"PromptTuning(init={self.init!r}) is written in words, and attach sees no tokenizer. Attach "
                "method.spell(tokenizer, labels), which holds their ids; dt.train does so by itself."
            )
        return [Prompt(self._fresh(token_embedding(site), site.device), self.seen_by_decoder)]

    @torch.no_grad()
    def _fresh(self, embedding: nn.Module, device: torch.device) -> Tensor:
        """P before training, (num_virtual_tokens, hidden)."""
        rows, width = table_shape(embedding)
        if any(not 0 <= token < rows for token in self.init_ids):
            raise InvalidValue(
                f"PromptTuning(init_ids=...) names a token outside the vocabulary of {rows}. Use the backbone's own tokenizer."
            )
        given = _embed(embedding, torch.tensor(self.init_ids, dtype=torch.long), device)
        spans = torch.split(given, list(self._lengths))
        first = [span.mean(0, keepdim=True) for span in spans]
        missing = self.num_virtual_tokens - len(first)
        if self.init == "random":
            rest = torch.empty(missing, width, device=device).uniform_(-self.init_range, self.init_range)
        else:
            rest = _embed(embedding, torch.randint(min(rows, self.init_vocabulary), (missing,)), device)
        return torch.cat([*first, rest])


class Prompt(PromptPatch):
    """P, (num_virtual_tokens, hidden)."""

    def __init__(self, P: Tensor, seen_by_decoder: bool) -> None:
        super().__init__()
        self.P, self.seen_by_decoder = nn.Parameter(P), seen_by_decoder

    def forward(self) -> Tensor:
        """P."""
        return self.P


def _embed(embedding: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """What the stack makes of these tokens, its scaling included, without the hooks of other deltas; in fp32."""
    embedded: Tensor = embedding.forward(ids.to(device))
    return embedded.float().to(device, copy=True)


def frequent_words(tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` tokens, by id, that alone stand for a word of at least two letters within a text.

    Special and unused tokens, single characters, and pieces that continue a word are none.
    """
    ids, found = sorted(tokenizer.get_vocab().values()), list[int]()
    for start in range(0, len(ids), _CHUNK):
        some = ids[start : start + _CHUNK]
        words = [text.strip() for text in tokenizer.batch_decode([[token] for token in some])]
        read = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        whole = (len(word) > 1 and word.isalpha() and back == [token] for token, word, back in zip(some, words, read, strict=True))
        found += compress(some, whole)
        if len(found) >= count:
            break
    return found[:count]


def _tokens(tokenizer: Any, word: str) -> list[int]:
    """The tokens of a word within a text: behind a blank, unless the blank is a token of its own.

    Raises:
        InvalidValue: there are none.
    """
    behind, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word))
    found: list[int] = min(behind, alone, key=len)
    if not found:
        raise InvalidValue(f"The label word {word!r} has no tokens. Give each label a word, or use init='vocabulary'.")
    return found
