"""The matrix: every registered method on every architecture of ``tests.models``, and what each cell may refuse.

Registering a method, or adding an architecture to ``tests.models``, adds its cells; all of them are expected to attach
and to merge unless the tables here say that they refuse. So a refusal that was not meant fails, and so does one that
went away.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import Method, methods
from tests.models import DECODERS, MODELS, SEQ2SEQ, Example, output, tokens

Test = TypeVar("Test", bound=Callable[..., None])

SMALL: dict[str, Any] = {
    "rank": 2,
    "bottleneck_dim": 4,
    "num_virtual_tokens": 3,
    "mid_dim": 8,
    "block_size": 4,
    "dimension": 200,
    "initial_sparsity": 0.5,
    "side_dim": 4,
    "token_ids": tuple(dict.fromkeys(tokens()["input_ids"][0, :4].tolist())),
    "drop_layers": 1,
}
"""Values of fields, by the field's name, that keep a fresh delta tiny and busy; other fields keep their defaults."""

NO_ROLES = {"conv_net": "*", "mlp": "*", "tied_mlp": "*"}
"""Models without transformer roles, and the ``where`` that is used for them."""

_LANGUAGE_MODELS = frozenset(build.__name__ for build in (*DECODERS, *SEQ2SEQ))
_BIASED = {"bert", "roberta", "deberta_v2", "distilbert", "mpnet", "gpt2", "opt", "phi", "gpt_neox", "bloom", "bart"}
_BIASED |= {"vit", "torch_encoder", "conv_net", "mlp", "tied_mlp"}

REFUSED: dict[str, frozenset[str]] = {
    "compacter-plus-plus": frozenset({"mixtral"}),
    "embedding-prefix-tuning": frozenset({"vit", "torch_encoder", *NO_ROLES}),
    "invertible-adapter": frozenset({"torch_encoder"}),
    "ladder-side-tuning": frozenset({"vit", "torch_encoder", *NO_ROLES}),
    "last-layer": frozenset(NO_ROLES),
    "last-layers": frozenset(NO_ROLES),
    "linear-probe": _LANGUAGE_MODELS | {"torch_encoder"},
    "mam": frozenset({"deberta_v2", "mpnet", "bloom", "mixtral", "torch_encoder", *NO_ROLES}),
    "multi-head-parallel-adapter": frozenset({"torch_encoder", *NO_ROLES}),
    "norm-tuning": frozenset({"mlp", "tied_mlp"}),
    "oft": frozenset({"conv_net"}),
    "p-tuning": frozenset({"vit", "torch_encoder", *NO_ROLES}),
    "p-tuning-v2": frozenset({"deberta_v2", "mpnet", "bloom", "torch_encoder", *NO_ROLES}),
    "parallel-adapter": frozenset(NO_ROLES),
    "pfeiffer-adapter": frozenset({"mixtral"}),
    "prefix-tuning": frozenset({"deberta_v2", "mpnet", "bloom", "torch_encoder", *NO_ROLES}),
    "prompt-tuning": frozenset({"vit", "torch_encoder", *NO_ROLES}),
    "scaled-parallel-adapter": frozenset({"mixtral", *NO_ROLES}),
    "selective-modules": frozenset(NO_ROLES),
    "trainable-tokens": frozenset({"vit", "torch_encoder", *NO_ROLES}),
    "unipelt": frozenset({"deberta_v2", "mpnet", "bloom", "mixtral", "torch_encoder", *NO_ROLES}),
}
"""Cells that cannot attach: virtual positions or tokens without text or without attention's interface, a probe without a head."""

UNMERGEABLE: dict[str, frozenset[str]] = {
    "adapter": frozenset(MODELS),
    "adapter-drop": frozenset(MODELS),
    "bitfit": frozenset(MODELS) - _BIASED,
    "compacter": frozenset(MODELS),
    "compacter-plus-plus": frozenset(MODELS),
    "embedding-prefix-tuning": frozenset(MODELS),
    "ia3": frozenset({"tied_mlp"}),
    "invertible-adapter": frozenset(MODELS),
    "ladder-side-tuning": frozenset(MODELS),
    "loreft": frozenset(MODELS),
    "low-rank-adapter": frozenset(MODELS),
    "mam": frozenset(MODELS),
    "multi-head-parallel-adapter": frozenset(MODELS),
    "p-tuning": frozenset(MODELS),
    "p-tuning-v2": frozenset(MODELS),
    "parallel-adapter": frozenset(MODELS),
    "partial-bitfit": frozenset(MODELS) - _BIASED,
    "pfeiffer-adapter": frozenset(MODELS),
    "phm-adapter": frozenset(MODELS),
    "prefix-tuning": frozenset(MODELS),
    "prompt-tuning": frozenset(MODELS),
    "scaled-parallel-adapter": frozenset(MODELS),
    "unipelt": frozenset(MODELS),
}
"""Cells whose delta is no change of a weight: bottlenecks, virtual positions, added biases, one owner of a tied weight scaled."""


@dataclass(frozen=True)
class Cell:
    """One method on one architecture, both by name."""

    method: str
    model: str

    def __str__(self) -> str:
        return f"{self.method}-{self.model}"

    @property
    def refuses(self) -> bool:
        """Attaching is an error here."""
        return self.model in REFUSED.get(self.method, ())

    @property
    def merges(self) -> bool:
        """The delta can be folded into the weights."""
        return self.model not in UNMERGEABLE.get(self.method, ())

    @property
    def recipe(self) -> Method:
        """The method with small settings."""
        return small(self.method)

    def fresh(self) -> Example:
        """A backbone of its own, and inputs."""
        return fresh(self.model)

    def attach(self, backbone: nn.Module, **options: Any) -> Delta:
        """Attach the method where it goes by default; everywhere in a model without roles."""
        torch.manual_seed(zlib.crc32(str(self).encode()))
        return attach(backbone, self.recipe, **{"where": NO_ROLES.get(self.model), **options})


TRAINING = [name for name in methods if methods[name].trains]
CONTROLS = [name for name in methods if not methods[name].trains]
CELLS = [Cell(method, model) for method in TRAINING for model in MODELS]
TAKEN = [cell for cell in CELLS if not cell.refuses]
REFUSING = [cell for cell in CELLS if cell.refuses]
MERGING = [cell for cell in TAKEN if cell.merges]
KEPT_APART = [cell for cell in TAKEN if not cell.merges]


def over(cells: Iterable[Cell]) -> Callable[[Test], Test]:
    """Run a test on every one of these cells; ``test_matrix`` checks that none is left out of such a test."""

    def decorate(test: Test) -> Test:
        marked: Test = pytest.mark.parametrize("cell", cells, ids=str)(test)
        marked.whole_matrix = True  # type: ignore[attr-defined]
        return marked

    return decorate


def small(name: str) -> Method:
    """An instance of a registered method with every field of ``SMALL`` that it has."""
    kind = methods[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{field: value for field, value in SMALL.items() if field in fields})


@cache
def _built(name: str) -> Example:
    return MODELS[name]()


def fresh(name: str) -> Example:
    """A copy of the model of that name, built once a process, and its inputs."""
    model, inputs = _built(name)
    return copy.deepcopy(model), dict(inputs)


@cache
def plain(name: str, autocast: torch.dtype | None = None) -> Tensor:
    """The output of the model of that name with nothing attached, computed once a process."""
    model, inputs = fresh(name)
    if autocast is None:
        with torch.no_grad():
            return output(model, inputs)
    with one_kernel(), torch.no_grad(), torch.autocast("cpu", autocast):
        return output(model, inputs)


@contextmanager
def one_kernel() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` has a fused path with other rounding, which it leaves where a module has hooks."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@torch.no_grad()
def shake(delta: Delta, spread: float = 0.05, seed: int = 3) -> None:
    """Move every trained parameter of a delta away from where it started, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in delta.trained_parameters().values():
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))


def moved(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / (expected.abs().max() + 1e-12))
