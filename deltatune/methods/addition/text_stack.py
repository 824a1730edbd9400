"""What a prompt reads of the text stack it stands in front of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.structure.site import Site


def token_embedding(site: Site) -> nn.Module:
    """The token embedding of a text stack.

    Raises:
        Unsupported: the site has none.
    """
    stack: Any = site.module
    if not hasattr(stack, "get_input_embeddings"):
        raise Unsupported(
            f"A prompt was asked for at `{site.path}` ({type(stack).__name__}), which has no token embeddings. "
            "Choose a text stack (role `stack`), or another method."
        )
    embedding: nn.Module = stack.get_input_embeddings()
    return embedding


def table_shape(embedding: nn.Module) -> tuple[int, int]:
    """Rows and width of a token embedding, quantised or not."""
    rows, width = getattr(embedding, "num_embeddings", None), getattr(embedding, "embedding_dim", None)
    if isinstance(rows, int) and isinstance(width, int):
        return rows, width  # a quantised table packs its weight
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]
