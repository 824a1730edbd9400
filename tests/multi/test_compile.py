"""``torch.compile`` sees one graph for all routes over the same deltas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.methods import IA3, BitFit, LoRA
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import batch, far

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_twenty_routes_make_two_graphs_at_most() -> None:
    backbone, _ = fresh("distilbert")
    names = ["a", "b", "scaled", "biases"]
    for seed, (name, method) in enumerate(zip(names, (LoRA(rank=2), LoRA(rank=2), IA3(), BitFit()), strict=True)):
        shake(dt.attach(backbone, method, name=name, head=False), seed=seed)
    dt.switch(backbone, None)
    for name in names:
        dt.bank(backbone).add(name)
    graphs = 0

    def counted(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(backbone, backend=counted)
    inputs = batch(4, padding=False)
    choices = [*names, None]
    for k in range(20):
        entries = [choices[(k * step + step) % 5] for step in (1, 2, 3, 4)]
        with dt.route(backbone, entries):
            found, expected = output(compiled, inputs), output(backbone, inputs)
        assert far(found, expected.unbind()) < 1e-5, entries
    assert graphs <= 2
