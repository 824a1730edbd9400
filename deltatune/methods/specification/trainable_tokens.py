"""Trainable tokens: some rows of the vocabulary train, such as those added for new words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods.kinds import Family, Kind, Method, OutputPatch, Patch, WeightPatch, methods
from deltatune.structure.site import Site, is_packed


@methods.register("trainable-tokens")
@dataclass(frozen=True)
class TrainableTokens(Method):
    """E'[t] = e_t for t in ``token_ids``, E'[t] = E[t] for all others; E: (vocabulary, d), e: (len(token_ids), d).

    Trains the rows e, which start as the backbone's own, so a fresh delta is the identity; several deltas add their
    changes. Where embedding and output head are tied, both see them. Rows are stored by value: a vocabulary grown anew by
    ``resize_token_embeddings`` has other random rows each time.

    Args:
        token_ids: the rows that train, each once.

    Raises:
        InvalidValue: an id twice or negative; at attach also no ids, or an id outside the vocabulary.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("embedding", "lm_head?")
    reads_weights: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    source: ClassVar[str] = "PEFT's method of the same name"

    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.token_ids)) != len(self.token_ids) or any(token < 0 for token in self.token_ids):
            raise InvalidValue(f"TrainableTokens(token_ids={self.token_ids!r}) was asked for; give each id once and none negative.")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """The rows of one table."""
        if not self.token_ids:
            raise InvalidValue("TrainableTokens() was asked for without tokens. Say which rows train: TrainableTokens(token_ids=(30522,)).")
        is_table = isinstance(site.module, nn.Embedding) or site.leaf == "lm_head"
        if not is_table or site.rows is not None:
            return []
        rows = site.weight.shape[0]
        if max(self.token_ids) >= rows:
            raise InvalidValue(
                f"TrainableTokens names token {max(self.token_ids)}, but `{site.path}` has {rows} rows. Resize the vocabulary first."
            )
        if site.weight.is_meta or is_packed(site.weight):
            raise Unsupported(
                f"The rows of `{site.path}` cannot be read: it is {'offloaded' if site.weight.is_meta else 'quantised'}. "
                "Load the backbone in memory and unquantised, or use another method, such as LoRA."
            )
        if isinstance(site.module, nn.Embedding) and not site.tied:
            return [LookedUpRows(site.module, self.token_ids)]
        return [ReplacedRows(site.parameter or "weight", site.weight, self.token_ids)]


class LookedUpRows(OutputPatch):
    """y + (e - e_0)[t] for trained tokens t, where e_0 are the backbone's own rows; the table itself is not copied."""

    commutes = "add"
    position: Tensor
    e_0: Tensor

    def __init__(self, table: nn.Embedding, token_ids: Sequence[int]) -> None:
        super().__init__()
        ids = torch.tensor(token_ids, device=table.weight.device)
        position = torch.zeros(table.num_embeddings, dtype=torch.long, device=table.weight.device)
        position[ids] = torch.arange(1, len(ids) + 1, device=ids.device)
        self.register_buffer("position", position, persistent=False)  # token -> 1-based row of e, 0 for all others
        self.register_buffer("e_0", table.weight.detach()[ids].float(), persistent=False)
        self.e = nn.Parameter(self.e_0.clone())
        self.embed_scale = float(getattr(table, "embed_scale", 1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Ids (...), embeddings (..., d) -> (..., d)."""
        row = self.position[x]
        change = F.embedding((row - 1).clamp(min=0), self.e - self.e_0) * self.embed_scale
        return y + torch.where((row > 0)[..., None], change, 0).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table with the change of the trained rows in it."""
        ids = self.position.nonzero().squeeze(1)
        return weight.index_add(0, ids, (self.e - self.e_0)[self.position[ids] - 1].to(weight.dtype)), bias


class ReplacedRows(WeightPatch):
    """theta with e - e_0 added to the rows of the trained tokens."""

    commutes = "add"
    ids: Tensor
    e_0: Tensor

    def __init__(self, parameter: str, theta: Tensor, token_ids: Sequence[int]) -> None:
        super().__init__()
        self.parameter = parameter
        self.register_buffer("ids", torch.tensor(token_ids, device=theta.device), persistent=False)
        self.register_buffer("e_0", theta.detach()[self.ids].float(), persistent=False)
        self.e = nn.Parameter(self.e_0.clone())

    def forward(self, theta: Tensor) -> Tensor:
        """(vocabulary, d) -> (vocabulary, d)."""
        return theta.index_add(0, self.ids, (self.e - self.e_0).to(theta.dtype))
