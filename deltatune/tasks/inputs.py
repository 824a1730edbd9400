"""Texts of a row as one input: with the tokenizer's special tokens, and cut where they are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from deltatune.errors import DataError
from deltatune.tasks.rows import Row, text_of
from deltatune.tasks.tensors import Features, padded
from deltatune.tasks.truncation import kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE = {"return_attention_mask": False, "return_token_type_ids": False}
"""Asks a tokenizer for token ids alone, which takes a third of the time off large batches."""


class Inputs:
    """One text or several -> token ids, of which the longest text loses tokens first.

    Two texts are a pair as the tokenizer makes them; further ones, and pairs of tokenizers that put nothing between, are
    joined by its separator, or by a line break where it has none.

    Args:
        tokenizer: of the backbone.
        max_length: most tokens of one input, special ones included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def tokens(self, rows: Sequence[Row], columns: Sequence[str], *, offsets: bool = False) -> list[Features]:
        """Token ids of the texts in some columns of each row with special ones, the longest text cut first."""
        if not len(rows):
            return []
        texts = [[text_of(row[column]) for row in rows] for column in columns]
        if len(columns) > 2 or (len(columns) == 2 and not self._between):
            return self._assembled(texts)
        asked = {"return_offsets_mapping": offsets, "return_attention_mask": False}
        encoded = self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length, **asked)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        found = [encoded[name] for name in names]
        features: list[Features] = [dict(zip(names, values, strict=True)) for values in zip(*found, strict=True)]
        if offsets:
            for feature, places in zip(features, encoded["offset_mapping"], strict=True):
                feature["offsets"] = places
        return features

    def _assembled(self, texts: Sequence[Sequence[str]]) -> list[Features]:
        """Pieces joined by the tokenizer's separator, or by a line break where it has none."""
        columns = [self.bare(column) for column in texts]
        between = self._between or self.bare(["\n"])[0]
        room = self.room - len(between) * (len(columns) - 2 if self._between else len(columns) - 1)
        features = []
        for pieces in zip(*columns, strict=True):
            cut = [piece[:length] for piece, length in zip(pieces, kept([len(piece) for piece in pieces], room), strict=True)]
            rest = [token for piece in cut[1:] for token in (*between, *piece)]
            features.append(self.joined(cut[0], rest[len(between) :] if self._between else rest)[0])
        return features

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special ones."""
        return list(self.tokenizer(list(texts), add_special_tokens=False, **BARE)["input_ids"]) if len(texts) else []

    def joined(self, first: Sequence[int], second: Sequence[int]) -> tuple[Features, int]:
        """A pair with its special tokens, and the place where the second begins."""
        before, between, after = (ids for ids, _ in self._pattern)
        parts = [before, first, between, second, after]
        feature: Features = {"input_ids": [token for part in parts for token in part]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            (_, zero), (_, one), (_, two) = self._pattern
            types = [zero, [0] * len(first), one, [self._second_type] * len(second), two]
            feature["token_type_ids"] = [number for part in types for number in part]
        return feature, len(before) + len(first) + len(between)

    @property
    def room(self) -> int:
        """Tokens that are left for the texts of a pair."""
        return self.max_length - sum(len(ids) for ids, _ in self._pattern)

    @property
    def _between(self) -> list[int]:
        return self._pattern[1][0]

    @property
    def _second_type(self) -> int:
        return self._pattern[2][1][0] if self._pattern[2][1] else 0

    @cached_property
    def _pattern(self) -> tuple[tuple[list[int], list[int]], ...]:
        """The special tokens before, between and behind the texts of a pair, each with their types."""
        [piece] = self.bare(["a"])
        whole = self.tokenizer("a", "a")
        ids, types = whole["input_ids"], whole.get("token_type_ids") or [0] * len(whole["input_ids"])
        size = len(piece)
        places = [place for place in range(len(ids) - size + 1) if ids[place : place + size] == piece]
        if len(places) < 2:
            raise DataError(f"{type(self.tokenizer).__name__} changes a text's tokens in a pair, so texts cannot be cut safely.")
        cuts = [0, places[0], places[0] + size, places[-1], places[-1] + size, len(ids)]
        stretches = [(ids[start:end], types[start:end]) for start, end in list(pairwise(cuts))[::2]]
        return tuple(stretches)

    def padded(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Right-padded ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the tokenizer makes them."""
        fill: Mapping[str, Any] = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0}
        batch = {name: padded([feature[name] for feature in features], value) for name, value in fill.items() if name in features[0]}
        batch["attention_mask"] = padded([[1] * len(feature["input_ids"]) for feature in features], 0)
        return batch
