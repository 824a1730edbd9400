"""TRAINABLE_TOKENS: rows of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.checkpoint.foreign import Part
from deltatune.checkpoint.peft.keys import TUNED
from deltatune.checkpoint.peft.tuner import Content, Output, Tuner, cannot, only, tuners
from deltatune.errors import CheckpointError
from deltatune.injection.delta import Delta
from deltatune.methods.specification.trainable_tokens import TrainableTokens

ROWS = "trainable_tokens_delta"


class Tokens(Tuner):
    """TRAINABLE_TOKENS."""

    methods = (TrainableTokens,)
    prefix = TUNED
    fields: ClassVar[Mapping[str, Any]] = {"init_weights": True, "target_modules": None, "token_indices": []}

    def read(self, content: Content) -> list[Part]:
        """The rows of each table that has them."""
        content.fields.data.pop("init_weights", None)
        ids = content.fields.take("token_indices", [], list)
        found: dict[tuple[str, str], Tensor] = {}
        tables: dict[int, Tensor] = {}
        for path in content.stored.paths({ROWS}):
            [rows] = content.stored.take(path, {ROWS}).values()
            site = content.modules.table(path)
            known = tables.setdefault(id(site.weight), rows)
            if known is not rows and torch.equal(known, rows):
                continue  # PEFT stores the rows of a tied head once more
            content.found.append(path)
            found[site.key, "e"] = rows
        if not found or not ids:
            raise CheckpointError(f"`{content.stored.file}` holds no rows, or its config does not say which. Copy or save it again.")
        return [Part("tokens", TrainableTokens(tuple(ids)), found)]

    def write(self, deltas: Sequence[Delta], output: Output) -> None:
        """The rows of each table; PEFT stores them once more for what is tied to it."""
        output.config["token_indices"] = list(
            only((delta.method.token_ids for delta in deltas if isinstance(delta.method, TrainableTokens)), "list of tokens")
        )
        for delta in deltas:
            for entry in delta.entries:
                if entry.head:
                    raise cannot(delta, "TRAINABLE_TOKENS has no head")
                paths = output.modules.tied_paths(entry.site)
                for path in paths:
                    output.add(TUNED, path, {ROWS: entry.patch.state_dict()["e"]})
                output.paths.append(paths[0])


tuners.register("TRAINABLE_TOKENS")(Tokens())
