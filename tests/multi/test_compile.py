"""``torch.compile`` sees one graph for all routes over the same deltas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.methods import IA3, BitFit, LoRA, ParallelAdapter, PrefixTuning
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


def graphs_of(model: str, methods: dict[str, Any], routes: list[list[Any]]) -> int:
    """How many graphs these routes make, each compared with what is computed without compilation."""
    backbone, _ = fresh(model)
    for seed, (name, method) in enumerate(methods.items()):
        shake(dt.attach(backbone, method, name=name, head=False), seed=seed)
    dt.switch(backbone, None)
    for name in methods:
        dt.bank(backbone).add(name)
    graphs = 0

    def counted(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(backbone, backend=counted)
    inputs = batch(4, padding=False)
    for entries in routes:
        with torch.no_grad(), dt.route(backbone, entries):
            found, expected = output(compiled, inputs), output(backbone, inputs)
        assert far(found, expected.unbind()) < 1e-5, entries
    return graphs


def test_twenty_routes_make_two_graphs_at_most() -> None:
    methods = {"a": LoRA(rank=2), "b": LoRA(rank=2), "scaled": IA3(), "biases": BitFit()}
    choices = [*methods, None]
    routes = [[choices[(k * step + step) % 5] for step in (1, 2, 3, 4)] for k in range(20)]
    assert graphs_of("distilbert", methods, routes) <= 2


def test_prefixes_change_places_without_a_new_graph() -> None:
    methods = {"a": LoRA(rank=2), "short": PrefixTuning(1, False), "long": PrefixTuning(3, False), "beside": ParallelAdapter(3)}
    routes = [["a", "short", "long", None], ["long", "short", "beside", "a"], [None, "a", "short", "long"]]
    assert graphs_of("llama", methods, routes) <= 2
