"""Prompt tuning: virtual tokens in front of the input embeddings (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.checks import one_of, positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, PromptPatch, methods
from deltatune.structure.site import Site


@methods.register("prompt-tuning")
@dataclass(frozen=True)
class PromptTuning(Method):
    """X <- [P; X] with P: (num_virtual_tokens, hidden) in front of the text's embeddings X, at the encoder where there is one.

    Trains P.

    Args:
        num_virtual_tokens: p.
        init: ``vocabulary`` starts from the embeddings of frequent tokens, ``random`` from U[-init_range, init_range].
        init_range: half the width of the random start.
        init_vocabulary: frequent tokens are those with ids below this; vocabularies are sorted by frequency.
        init_ids: tokens whose embeddings come first, such as the class labels; ``init`` fills the rest.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("stack", "!decoder.stack?")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3e-2
    source: ClassVar[str] = "arXiv:2104.08691"

    num_virtual_tokens: int = 100
    init: str = "vocabulary"
    init_range: float = 0.5
    init_vocabulary: int = 5000
    init_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "init_range", "init_vocabulary")
        one_of(self, "init", ("vocabulary", "random"))
        if len(self.init_ids) > self.num_virtual_tokens:
            raise InvalidValue(
                f"PromptTuning(init_ids=...) was given {len(self.init_ids)} tokens for {self.num_virtual_tokens} virtual ones. "
                "Give fewer, or raise `num_virtual_tokens`."
            )

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prompt a text stack."""
        stack: Any = site.module
        if not hasattr(stack, "get_input_embeddings"):
            raise Unsupported(
                f"A prompt was asked for at `{site.path}` ({type(stack).__name__}), which has no token embeddings. "
                "Choose a text stack (role `stack`), or another method."
            )
        return [Prompt(self._fresh(stack.get_input_embeddings(), site.device))]

    @torch.no_grad()
    def _fresh(self, embedding: nn.Module, device: torch.device) -> Tensor:
        """P before training, (num_virtual_tokens, hidden)."""
        rows, width = _table(embedding)
        if any(not 0 <= token < rows for token in self.init_ids):
            raise InvalidValue(
                f"PromptTuning(init_ids=...) names a token outside the vocabulary of {rows}. Use the backbone's own tokenizer."
            )
        first = _embed(embedding, torch.tensor(self.init_ids, dtype=torch.long), device)
        missing = self.num_virtual_tokens - len(self.init_ids)
        if self.init == "random":
            rest = torch.empty(missing, width, device=device).uniform_(-self.init_range, self.init_range)
        else:
            rest = _embed(embedding, torch.randint(min(rows, self.init_vocabulary), (missing,)), device)
        return torch.cat([first, rest])


class Prompt(PromptPatch):
    """P, (num_virtual_tokens, hidden)."""

    def __init__(self, P: Tensor) -> None:
        super().__init__()
        self.P = nn.Parameter(P)

    def forward(self) -> Tensor:
        """P."""
        return self.P


def _table(embedding: nn.Module) -> tuple[int, int]:
    rows, width = getattr(embedding, "num_embeddings", None), getattr(embedding, "embedding_dim", None)
    if isinstance(rows, int) and isinstance(width, int):
        return rows, width  # a quantised table packs its weight
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]


def _embed(embedding: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """What the stack makes of these tokens, its scaling included, without the hooks of other deltas; in fp32."""
    embedded: Tensor = embedding.forward(ids.to(device))
    return embedded.float().to(device, copy=True)
