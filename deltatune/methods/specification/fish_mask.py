"""FISH mask: the entries with the largest Fisher information train (Sung et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import Unsupported
from deltatune.methods.checks import positive, proportion
from deltatune.methods.kinds import Family, Kind, Method, Patch, methods
from deltatune.methods.specification.sparse import SparseDifference, largest
from deltatune.structure.site import Site

Batch = Mapping[str, Any]


@methods.register("fish-mask")
@dataclass(frozen=True)
class FISHMask(Method):
    """theta' = theta + sum_j v_j e_{i_j}, i = the k entries with the largest F, k = density * |Theta| over all parameters together.

        F = 1/N sum_{n=1..N} (d log p(y_n | x_n) / d theta)^2

    Trains v = 0 at the start, one value an entry, at positions that are fixed before the first step, when ``prepare``
    has seen N labelled examples one by one. Until then the positions are spread evenly. Files hold positions and values.

    Args:
        density: share of the entries that train, in (0, 1].
        samples: N.

    Raises:
        InvalidValue: a field out of its range.
    """

    family: ClassVar[Family] = "specification"
    kind: ClassVar[Kind] = "weight"
    where: ClassVar[tuple[str, ...]] = ("*",)
    learning_rate: ClassVar[float] = 1e-3
    source: ClassVar[str] = "arXiv:2111.09839"

    density: float = 0.005
    samples: int = 256

    def __post_init__(self) -> None:
        proportion(self, "density")
        positive(self, "samples")

    def build(self, site: Site, shared: nn.Module | None) -> Sequence[Patch]:
        """One difference for each parameter of the site; a task head trains in full beside them."""
        if site.leaf == "readout":
            return []
        parts = {name: site.part(site.module.get_parameter(name)) for name in site.parameters}
        return [SparseDifference(name, theta, _spread(theta.numel(), self.density)) for name, theta in parts.items()]

    def prepare(self, patches: Mapping[str, Patch], backbone: nn.Module, batches: Iterable[Batch]) -> None:
        """Choose the positions.

        Raises:
            Unsupported: the backbone returns no loss, or several processes train, whose gradients were laid out for other sizes.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise Unsupported(
                "FISHMask was asked to choose its positions in a run of several processes, which have agreed on other sizes by then. "
                "Prepare and save it in one process, then load it in all of them."
            )
        chosen = [patch for patch in patches.values() if isinstance(patch, SparseDifference)]
        scores = fisher(chosen, backbone, islice(_examples(batches), self.samples))
        for patch, positions in zip(chosen, largest(scores, self.density), strict=True):
            patch.choose(positions)


def _spread(size: int, density: float) -> Tensor:
    """density * size positions at equal distances, at least one."""
    k = max(1, round(density * size))
    return torch.arange(k) * size // k


def fisher(patches: Sequence[SparseDifference], backbone: nn.Module, examples: Iterable[Batch]) -> list[Tensor]:
    """Diagonal of the empirical Fisher information of what each weight patch returns, up to the factor 1/N.

    Args:
        patches: weight patches that act on ``backbone``.
        backbone: returns a loss for each example; it runs in eval mode.
        examples: batches of one row.

    Returns:
        For each patch the sum of squared gradients, of theta's shape; 0 where no example came by.
    """
    seen: list[list[Tensor]] = [[] for _ in patches]
    sums: list[Tensor | None] = [None] * len(patches)
    handles = [patch.register_forward_hook(partial(_note, found)) for patch, found in zip(patches, seen, strict=True)]
    try:
        with _evaluating(backbone), torch.enable_grad():
            for example in examples:
                loss = _loss(backbone, example)
                gradients = iter(torch.autograd.grad(loss, [theta for found in seen for theta in found], allow_unused=True))
                for k, found in enumerate(seen):
                    own = [gradient for _ in found if (gradient := next(gradients)) is not None]
                    if own:
                        summed = torch.stack(own).sum(0)
                        square = summed.to(torch.promote_types(summed.dtype, torch.float32)).square()
                        sums[k] = square if sums[k] is None else sums[k].add_(square)  # type: ignore[union-attr]
                    found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [torch.zeros(patch.entries) if total is None else total for patch, total in zip(patches, sums, strict=True)]


def _note(found: list[Tensor], patch: nn.Module, args: Any, theta: Tensor) -> None:
    """Forward hook of a patch: keep what it returned."""
    found.append(theta)


def _loss(backbone: nn.Module, example: Batch) -> Tensor:
    loss = getattr(backbone(**example), "loss", None)
    if loss is None:
        raise Unsupported(
            f"FISHMask was asked to prepare on {type(backbone).__name__}, which returns no `loss` for a batch with labels. "
            "Use a model that does, as transformers' task models do."
        )
    return loss  # type: ignore[no-any-return]


def _examples(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """The rows of the batches, one at a time."""
    for batch in batches:
        rows = max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), default=0)
        for k in range(rows):
            yield {name: value[k : k + 1] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()}


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """Eval mode for a moment; every module is as it was behind it."""
    before = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
