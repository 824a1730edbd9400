"""Embedding prefix: prefix tuning at the input embeddings only, its ablation (Li and Liang 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.methods.addition.made_prompt import MadePrompt, are_exported, export_prompts
from deltatune.methods.addition.prefix import SharedLayer
from deltatune.methods.addition.text_stack import table_shape, token_embedding
from deltatune.methods.checks import positive
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.structure.site import Site


@methods.register("embedding-prefix-tuning")
@dataclass(frozen=True)
class EmbeddingPrefixTuning(Method):
    """X <- [P; X] with P = tanh(E W_1^T + c_1) W_2^T + c_2: the MLP of prefix tuning, but the layers compute keys and values.

    Trains E: (num_virtual_tokens, mid_dim), W_1: (mid_dim, mid_dim), W_2: (hidden, mid_dim), c_1 and c_2; ``export`` keeps
    P: (num_virtual_tokens, hidden) alone. The paper finds it too weak: it shows what a prefix in every layer adds.

    Args:
        num_virtual_tokens: l.
        mid_dim: width of E and of the MLP's hidden layer.
        seen_by_decoder: the decoder behind an encoder attends to the encoder's outputs at the virtual tokens, too, so that
            these stay in the outputs; else they are cut off.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "addition"
    sub_family: ClassVar[str] = "soft prompt"
    kind: ClassVar[Kind] = "context"
    where: ClassVar[tuple[str, ...]] = ("stack", "!decoder.stack?")
    identity: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-3
    source: ClassVar[str] = "arXiv:2101.00190"

    num_virtual_tokens: int = 20
    mid_dim: int = 512
    seen_by_decoder: bool = False

    def __post_init__(self) -> None:
        positive(self, "num_virtual_tokens", "mid_dim")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One prompt a text stack."""
        return [EmbeddingPrefix(table_shape(token_embedding(site))[1], self)]

    def export(self, patches: Sequence[Patch], shared: nn.Module | None) -> None:
        """Replace the MLP by the P it makes."""
        export_prompts(patches)

    def is_exported(self, patches: Sequence[Patch]) -> bool:
        """Every prompt holds its P."""
        return are_exported(patches)


class EmbeddingPrefix(MadePrompt):
    """P = H W_2^T + c_2 with H from the layer that prefix tuning shares among its sites."""

    def __init__(self, width: int, method: EmbeddingPrefixTuning) -> None:
        super().__init__()
        bound = 1 / math.sqrt(method.mid_dim)
        self.layer, self.seen_by_decoder = SharedLayer(method), method.seen_by_decoder
        self.W_2 = nn.Parameter(torch.empty(width, method.mid_dim).uniform_(-bound, bound))
        self.c_2 = nn.Parameter(torch.zeros(width))

    def make(self) -> Tensor:
        """H (tokens, mid_dim) -> P (tokens, width)."""
        return F.linear(self.layer(), self.W_2, self.c_2)
