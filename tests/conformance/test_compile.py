"""``torch.compile``: no graph break of ours, and what is attached, disabled or merged after compilation is seen.

A sample: every architecture, every method and every way of acting, not all cells.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.switching import switch
from deltatune.methods import BitFit, DiffPruning, LoRA
from tests.conformance.cells import MODELS, TAKEN, TRAINING, Cell, fresh, moved, shake
from tests.conformance.sample import pairwise
from tests.models import SORTS, output

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo hides it itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # BLOOM's GeLU
]


CHEAP = ("vit", "distilbert", "llama")
PLAIN = {build.__name__ for build in SORTS["plain"]}
DEAR = {"did", "said"}
"""They transform every parameter of the model anew, which takes ten seconds and more to trace on any but the smallest."""


def _pairwise() -> list[Cell]:
    """Every way of acting on every sort, and every architecture; then the methods that met no transformer, where tracing is cheap."""
    first = pairwise((cell for cell in TAKEN if cell.method not in DEAR or cell.model == "mlp"), ("act", "sort"), ("model",))
    left = set(TRAINING) - {cell.method for cell in first if cell.model not in PLAIN}
    places = {method: ("torch_encoder",) if method in DEAR else CHEAP for method in left}
    return first + pairwise((cell for cell in TAKEN if cell.model in places.get(cell.method, ())), ("method",))


PAIRWISE = _pairwise()
KINDS = ("lora-mlp", "diff-pruning-mlp", "bitfit-mlp", "prefix-tuning-distilbert")
"""One method per kind: output, weight, selection, context."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where inductor keeps torch's headers, whose compilation costs more than that of a small model: once for all workers."""
    own = tmp_path_factory.getbasetemp()
    return (own if worker_id == "master" else own.parent) / "inductor"


def test_every_architecture_and_every_method_is_there() -> None:
    assert {cell.model for cell in PAIRWISE} == set(MODELS)
    assert {cell.method for cell in PAIRWISE if cell.model not in PLAIN} == set(TRAINING)
    assert {cell.recipe.kind for cell in TAKEN if str(cell) in KINDS} == {cell.recipe.kind for cell in TAKEN}


@pytest.mark.parametrize("cell", PAIRWISE, ids=str)
def test_it_compiles_whole(cell: Cell) -> None:
    _check_compiled(cell, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", [cell for cell in TAKEN if str(cell) in KINDS], ids=str)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inductor_for_one_method_per_kind(kind: Cell, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(headers))
    with config.patch(compile_threads=1):
        _check_compiled(kind, "inductor")


def _check_compiled(cell: Cell, backend: str) -> None:
    """One graph, with the outputs and the gradients that there are without compilation."""
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    trained = list(delta.trained_parameters().values())
    expected = output(backbone, inputs)
    gradients = torch.autograd.grad(expected.float().square().mean(), trained)
    compiled = torch.compile(backbone, fullgraph=True, backend=backend)
    found = output(compiled, inputs)
    assert moved(found.detach(), expected.detach()) < 1e-5
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for one, other in zip(torch.autograd.grad(found.float().square().mean(), trained), gradients, strict=True):
        assert float((one - other).abs().max()) < 1e-4 * scale


def _same(found: Tensor, expected: Tensor) -> bool:
    return moved(found, expected) < 1e-5


@pytest.mark.parametrize("model", ["conv_net", "tied_mlp"])
@torch.no_grad()
def test_everything_after_compilation_is_seen(model: str) -> None:
    backbone, inputs = fresh(model)
    compiled = torch.compile(backbone, backend="aot_eager")
    plain = output(compiled, inputs)
    for method in (LoRA(rank=2), DiffPruning(), BitFit()):
        delta = attach(backbone, method, "*", name="one")
        shake(delta)
        acting = output(backbone, inputs)
        assert not _same(acting, plain)
        assert _same(output(compiled, inputs), acting), "attached"
        delta.disable()
        assert _same(output(compiled, inputs), plain), "disabled"
        delta.enable()
        assert _same(output(compiled, inputs), acting), "enabled"
        shake(delta, seed=9)
        trained = output(backbone, inputs)
        assert not _same(trained, acting)
        assert _same(output(compiled, inputs), trained), "trained"
        merge(delta)
        assert _same(output(compiled, inputs), trained), "merged"
        unmerge(delta)
        detach(delta)
        assert _same(output(compiled, inputs), plain), "detached"


@torch.no_grad()
def test_switching_and_composing_after_compilation_are_seen() -> None:
    backbone, inputs = fresh("bert")
    compiled = torch.compile(backbone, backend="aot_eager")
    pair = [attach(backbone, LoRA(rank=2), name=name, head=False) for name in ("a", "b")]
    for k, delta in enumerate(pair):
        shake(delta, seed=k)
    for name in ("a", "b", None, "a"):
        switch(backbone, name)
        assert _same(output(compiled, inputs), output(backbone, inputs)), name
    compose(backbone, pair, "weighted", weights=[0.5, 2.0])
    assert _same(output(compiled, inputs), output(backbone, inputs))


def test_a_compiled_backbone_trains() -> None:
    backbone, inputs = fresh("gpt2")
    delta = attach(backbone, LoRA(rank=2))
    compiled = torch.compile(backbone, backend="aot_eager")
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = output(compiled, inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        assert _same(output(compiled, inputs), output(backbone, inputs))
