"""Two threads on one backbone: where weights are swapped the second gets a clear error and nothing is lost; else both run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import Busy
from deltatune.injection.attach import attach, detach
from deltatune.injection.weights import WeightAct
from deltatune.methods import LoRA
from deltatune.methods.kinds import WeightPatch
from tests.conformance.cells import TAKEN, TRAINING, Cell, fresh, shake
from tests.conformance.trace import trace
from tests.models import output

MODEL = "bert"
CELLS = [cell for cell in TAKEN if cell.model == MODEL]


def _swaps(backbone: nn.Module) -> bool:
    slots = (module._modules.get("deltatune") for module in backbone.modules())
    return any(isinstance(act, WeightAct) for slot in slots if slot is not None for act in getattr(slot, "acts", {}).values())


def _in_the_middle(backbone: nn.Module, at: nn.Module, second: Callable[[], Any]) -> Any:
    """Call ``second`` from another thread while the first one is inside the forward of ``at``."""
    found: list[Any] = []

    def pause(*_: object) -> None:
        if threading.current_thread() is main and not found:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(second))
                found[0].exception(timeout=60)

    main = threading.current_thread()
    handle = at.register_forward_pre_hook(pause)
    try:
        with torch.no_grad():
            first = output(backbone, fresh(MODEL)[1])
    finally:
        handle.remove()
    return first, found[0]


def test_every_method_is_there() -> None:
    assert len({cell.method for cell in CELLS}) > 0.9 * len(TRAINING)
    assert {"lora", "diff-pruning", "prefix-tuning", "prompt-tuning", "bitfit"} <= {cell.method for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_second_thread(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    before = trace(backbone)
    with torch.no_grad():
        plain = output(backbone, inputs)
        delta = cell.attach(backbone)
        shake(delta)
        expected = output(backbone, inputs)
    assert _swaps(backbone) == any(isinstance(patch, WeightPatch) for patch in delta.patches)
    attached = trace(backbone)

    def second() -> Tensor:
        with torch.no_grad():
            return output(backbone, inputs)

    hosts = [entry.hosts[0].module for entry in delta.entries if isinstance(entry.patch, WeightPatch)]
    at = hosts[-1] if hosts else backbone.get_submodule("bert.encoder.layer.1.intermediate.dense")
    first, future = _in_the_middle(backbone, at, second)
    assert torch.equal(first, expected)
    if _swaps(backbone):
        with pytest.raises(Busy, match=r"Run one forward at a time, or give each thread its own copy\.deepcopy"):
            future.result()
    else:
        assert torch.equal(future.result(), expected)
    assert trace(backbone).differences(attached) == []
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)
    detach(delta)
    assert trace(backbone).differences(before) == []
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


def test_many_threads_lose_no_weight() -> None:
    backbone, inputs = fresh("tied_mlp")
    delta = attach(backbone, LoRA(rank=2), ["first", "last"])
    shake(delta)
    attached = trace(backbone)
    with torch.no_grad():
        expected = output(backbone, inputs)

    def run(_: int) -> bool | None:
        try:
            with torch.no_grad():
                return torch.equal(output(backbone, inputs), expected)
        except Busy:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(400)))
    assert False not in found
    assert True in found
    assert trace(backbone).differences(attached) == []


def test_the_error_of_a_forward_gives_the_weights_and_the_turn_back() -> None:
    backbone, inputs = fresh("tied_mlp")
    delta = attach(backbone, LoRA(rank=2), ["first"])
    shake(delta)
    attached, expected = trace(backbone), output(backbone, inputs)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        output(backbone, {"x": torch.zeros(2, 3)})
    assert trace(backbone).differences(attached) == []
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: output(backbone, inputs)).result(), expected)
