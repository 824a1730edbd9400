"""Virtual tokens per row: what context kinds do in a batch whose rows carry different prefixes or prompts.

Rows with fewer virtual tokens than the longest are filled up in front with hidden ones, so that in every row the virtual
tokens stand next to the text; each row's text is shifted by its own number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from deltatune.methods.kinds import ConditionalPrefixPatch, PrefixPatch, PromptPatch

Prefixes = Sequence[PrefixPatch | ConditionalPrefixPatch]
Chained = TypeVar("Chained")


class RowTokens:
    """How many virtual tokens each row of a route has.

    Args:
        chosen: one per row: which of the programs it uses.
        lengths: of each program, how many tokens.
        ahead: of each program, how many of them take the positions ahead of the text.
    """

    def __init__(self, chosen: Tensor, lengths: Sequence[int], ahead: Sequence[int]) -> None:
        self.chosen = chosen
        self.length = max(lengths)
        self.shape = tuple(lengths), tuple(ahead)
        self._lengths = torch.tensor(lengths, device=chosen.device)
        self._ahead = torch.tensor(ahead, device=chosen.device)

    def spread(self, batch: int) -> Tensor:
        """Which program each row of a batch uses, (batch,): it may hold each row of the route several times in a row."""
        factor = batch // self.chosen.shape[0]
        return self.chosen.repeat_interleave(factor) if factor > 1 else self.chosen

    def lengths(self, batch: int) -> Tensor:
        """Virtual tokens of each row, (batch,)."""
        return self._lengths[self.spread(batch)]

    def ahead(self, batch: int) -> Tensor:
        """By how much each row's text is shifted, (batch,)."""
        return self._ahead[self.spread(batch)]

    @property
    def hidden(self) -> tuple[int, ...]:
        """Of each program, how many hidden tokens stand in front."""
        return tuple(self.length - length for length in self.shape[0])

    def visible(self, batch: int) -> Tensor:
        """Which of the ``length`` columns in front are a row's own, (batch, length)."""
        place = torch.arange(self.length, device=self.chosen.device)
        return place >= self.length - self.lengths(batch)[:, None]


@dataclass(frozen=True)
class Joined:
    """Keys and values of virtual tokens, (batch, heads, length, head_dim) each."""

    key: Tensor
    value: Tensor


class RowPrefixes(RowTokens):
    """The prefixes of each row at one attention.

    Args:
        chosen: one per row: which of the programs it uses.
        programs: the prefixes that act together; one program is empty where rows have none.
        lengths: of each program.
        ahead: of each program.

    Attributes:
        prompts: of the same stack, where its positions are relative: hidden prompt tokens stand between prefix and text.
        is_conditional: some prefix depends on the attention's input.
    """

    def __init__(self, chosen: Tensor, programs: Sequence[Prefixes], lengths: Sequence[int], ahead: Sequence[int]) -> None:
        super().__init__(chosen, lengths, ahead)
        self.programs = tuple(tuple(program) for program in programs)
        self.is_conditional = any(isinstance(patch, ConditionalPrefixPatch) for program in self.programs for patch in program)
        self.prompts: RowPrompts | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    def prefix(self, key: Tensor, x: Tensor | None, rows_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """P_k and P_v of every row.

        Args:
            key: (batch, heads, keys, head_dim), of the text.
            x: what the attention was given, where a prefix depends on it.
            rows_of: brings virtual keys ([batch,] heads, length, head_dim) to the batch and type of the text's.
        """
        batch = key.shape[0]
        if self.is_conditional:
            assert x is not None
            return self._conditional(key, x, rows_of)
        stacked = self._held
        if stacked is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            first = key[:1]
            filled = [self._filled([patch() for patch in program], first, rows_of) for program in self.programs]
            stacked = torch.cat([pair[0] for pair in filled]), torch.cat([pair[1] for pair in filled])
            if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                self._held = stacked
        chosen = self.spread(batch)
        return stacked[0].to(key).index_select(0, chosen), stacked[1].to(key).index_select(0, chosen)

    def _conditional(self, key: Tensor, x: Tensor, rows_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        batch = key.shape[0]
        P_k = key.new_zeros(batch, key.shape[1], self.length, key.shape[3])
        P_v = torch.zeros_like(P_k)
        chosen = self.spread(batch)
        for number, program in enumerate(self.programs):
            rows = (chosen == number).nonzero().squeeze(1)
            if not program or not len(rows):
                continue
            own = x.index_select(0, rows)
            pairs = [patch(own) if isinstance(patch, ConditionalPrefixPatch) else patch() for patch in program]
            k, v = self._filled(pairs, key.index_select(0, rows), rows_of)
            P_k, P_v = (whole.index_copy(0, rows, part.expand(len(rows), *part.shape[1:])) for whole, part in ((P_k, k), (P_v, v)))
        return P_k, P_v

    def _filled(
        self, pairs: Sequence[tuple[Tensor, Tensor]], key: Tensor, rows_of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One program's keys and values, hidden ones in front."""
        found = []
        for k in range(2):
            parts = [rows_of(pair[k], key) for pair in pairs]
            missing = self.length - sum(part.shape[2] for part in parts)
            batch = parts[0].shape[0] if parts else 1
            found.append(torch.cat([key.new_zeros(batch, key.shape[1], missing, key.shape[3]), *parts], dim=2))
        return found[0], found[1]


class RowPrompts(RowTokens):
    """The prompts of each row at one text stack.

    Args:
        chosen: one per row: which of the programs it uses.
        programs: the prompts that act together; one program is empty where rows have none.
        columns: of each virtual token of each program, whether a decoder sees what the encoder makes of it.

    Attributes:
        keeps: some are seen.
    """

    def __init__(self, chosen: Tensor, programs: Sequence[Sequence[PromptPatch]], columns: Sequence[Sequence[bool]]) -> None:
        lengths = [len(own) for own in columns]
        super().__init__(chosen, lengths, lengths)
        self.programs = tuple(tuple(program) for program in programs)
        self.keeps = any(any(own) for own in columns)
        self._seen = torch.tensor([[False] * (self.length - len(own)) + [*own] for own in columns], device=chosen.device)

    def seen(self, batch: int) -> Tensor:
        """Which of the ``length`` columns in front a decoder sees, (batch, length)."""
        return self._seen[self.spread(batch)]

    def prompts(self, embeds: Tensor) -> Tensor:
        """P of every row: (batch, length, hidden), hidden ones in front."""
        filled = []
        for program in self.programs:
            parts = [patch().to(embeds) for patch in program]
            missing = self.length - sum(part.shape[0] for part in parts)
            filled.append(torch.cat([embeds.new_zeros(missing, embeds.shape[-1]), *parts]))
        return torch.stack(filled).index_select(0, self.spread(embeds.shape[0]))
