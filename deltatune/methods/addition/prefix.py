"""The prefix of one attention, held as it is or made by an MLP that all sites share, and the shape that an attention asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.methods.kinds import Patch, PrefixPatch
from deltatune.structure.rows import heads_of
from deltatune.structure.site import Site

_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head", "head_width")
_WIDTH = ("embed_dim", "hidden_size", "all_head_size", "inner_dim", "dim", "d_model")


class Reparameterized(Protocol):
    """What the shared layer reads of a method."""

    @property
    def num_virtual_tokens(self) -> int:
        """l."""

    @property
    def mid_dim(self) -> int:
        """Width of E and of the hidden layer."""


class Prefixing(Reparameterized, Protocol):
    """What a prefix reads of a method."""

    @property
    def init_std(self) -> float:
        """Standard deviation of a fresh P that nothing makes."""


class SharedLayer(nn.Module):
    """H = tanh(E W_1^T + c_1), (num_virtual_tokens, mid_dim), one for all sites."""

    def __init__(self, method: Reparameterized) -> None:
        super().__init__()
        bound = 1 / math.sqrt(method.mid_dim)
        self.E = nn.Parameter(torch.randn(method.num_virtual_tokens, method.mid_dim))
        self.W_1 = nn.Parameter(torch.empty(method.mid_dim, method.mid_dim).uniform_(-bound, bound))
        self.c_1 = nn.Parameter(torch.zeros(method.mid_dim))

    def forward(self) -> Tensor:
        """H."""
        return torch.tanh(F.linear(self.E, self.W_1, self.c_1))

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Be empty where the prefixes hold their P."""
        if not state:
            self._parameters.clear()


class Prefix(PrefixPatch):
    """P_k and P_v of one attention, held as they are or made from the shared layer.

    Args:
        heads: of the keys and values.
        head_dim: their width.
        method: l, the MLP's width, and the start of a P that nothing makes.
        shared: the shared layer; None where P is held as it is.
        dropout: on P, in training.
        placed: see ``PrefixPatch``.
    """

    def __init__(
        self, heads: int, head_dim: int, method: Prefixing, shared: nn.Module | None, dropout: float = 0.0, placed: bool = True
    ) -> None:
        super().__init__()
        self.placed = placed
        shared = shared if isinstance(shared, SharedLayer) else None
        self.dropout = dropout
        self.shape = (heads, method.num_virtual_tokens, head_dim)
        self._shared = (shared,)  # in a tuple, so that it is no child: the delta owns it
        if shared is None:
            self.P_k = nn.Parameter(torch.randn(self.shape) * method.init_std)
            self.P_v = nn.Parameter(torch.randn(self.shape) * method.init_std)
        else:
            bound = 1 / math.sqrt(method.mid_dim)
            self.W_2 = nn.Parameter(torch.empty(2 * heads * head_dim, method.mid_dim).uniform_(-bound, bound))
            self.c_2 = nn.Parameter(torch.zeros(2 * heads * head_dim))

    @property
    def shared(self) -> SharedLayer | None:
        """The layer it is made from; None once it holds its P."""
        return self._shared[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each (key_value_heads, num_virtual_tokens, head_dim)."""
        P_k, P_v = (self.P_k, self.P_v) if self.shared is None else self._made(self.shared)
        return F.dropout(P_k, self.dropout, self.training), F.dropout(P_v, self.dropout, self.training)

    def _made(self, shared: SharedLayer) -> tuple[Tensor, Tensor]:
        """H (tokens, mid_dim) -> P_k and P_v."""
        heads, length, head_dim = self.shape
        made = F.linear(shared().to(self.W_2.device), self.W_2, self.c_2).view(length, 2, heads, head_dim)
        return made[:, 0].transpose(0, 1), made[:, 1].transpose(0, 1)

    def export(self) -> None:
        """Hold P instead of what makes it."""
        if self.shared is None:
            return
        with torch.no_grad():
            made = self._made(self.shared)
        self._shared = (None,)
        self._parameters.clear()
        self.P_k, self.P_v = (nn.Parameter(part.contiguous()) for part in made)

    def reform(self, state: Mapping[str, Tensor]) -> None:
        """Hold P where the state holds P."""
        if "P_k" in state:
            self.export()


def export_prefixes(patches: Sequence[Patch], shared: nn.Module | None) -> None:
    """Replace the MLP by the P it makes, in every prefix."""
    for patch in patches:
        if isinstance(patch, Prefix):
            patch.export()
    if isinstance(shared, SharedLayer):
        shared._parameters.clear()


def are_exported(patches: Sequence[Patch]) -> bool:
    """Every prefix holds its P."""
    return all(patch.shared is None for patch in patches if isinstance(patch, Prefix))


def key_value_shape(site: Site) -> tuple[int, int]:
    """Heads of the keys and values of an attention (fewer than the queries' where they are grouped), and their width.

    Raises:
        Unsupported: neither the attention nor its config tells.
    """
    heads = heads_of(site.module)
    sources = (site.module, getattr(site.module, "config", None))
    widths = (_positive(source, name) for source in sources for name in _HEAD_DIM)
    head_dim = next((width for width in widths if width), 0)
    if not head_dim and heads is not None:
        totals = (_positive(source, name) for source in sources for name in _WIDTH)
        head_dim = next((total for total in totals if total), 0) // heads.query
    if heads is None or not head_dim:
        raise Unsupported(
            f"A prefix was asked for at `{site.path}` ({type(site.module).__name__}), which does not tell how many heads it has and how "
            "wide they are. Choose the attention modules (role `attention`), or another method for this backbone."
        )
    return heads.groups, head_dim


def _positive(source: object, name: str) -> int:
    value = getattr(source, name, None)
    return value if isinstance(value, int) and value > 0 else 0
