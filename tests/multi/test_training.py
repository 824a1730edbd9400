"""Gradient checkpointing, autocast and another thread beside a route."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, LoRA, PrefixTuning
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import batch, far, naive, routed

ENTRIES = ["low", None, "scaled", "bottle", "prefix", "low"]


def attached(model: str = "llama") -> nn.Module:
    backbone, _ = fresh(model)
    methods = {"low": LoRA(rank=3), "scaled": IA3(), "bottle": Adapter(bottleneck_dim=4), "prefix": PrefixTuning(2, mid_dim=4)}
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        shake(dt.attach(backbone, method, name=name, head=False), seed=seed)
    return backbone


def losses(backbone: nn.Module) -> Tensor:
    with dt.route(backbone, ENTRIES):
        return output(backbone, batch(len(ENTRIES))).square().flatten(1).mean(1)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_what_is_computed_anew_uses_the_route_of_its_forward(reentrant: bool) -> None:
    """The backward comes when the route is over, and another one is open."""
    gradients = []
    for checkpointed in (False, True):
        backbone = attached()
        backbone.train()
        if checkpointed:
            backbone.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            if reentrant:
                backbone.enable_input_require_grads()  # type: ignore[operator]
        loss = losses(backbone).sum()
        with dt.route(backbone, ENTRIES[::-1]):
            loss.backward()
        gradients.append([parameter.grad for delta in dt.deltas(backbone) for parameter in delta.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


def test_rows_train_alone() -> None:
    """A step on all rows together moves each delta as a step on its own rows."""
    together, apart = attached(), attached()
    inputs = batch(4)
    for backbone in (together, apart):
        dt.detach(next(delta for delta in dt.deltas(backbone) if delta.name == "prefix"))
    optimizer = torch.optim.SGD([parameter for delta in dt.deltas(together) for parameter in delta.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with dt.route(together, ["low", "scaled", None, "bottle"]):
            output(together, inputs).square().flatten(1).mean(1).sum().backward()
        optimizer.step()
    for i, name in ((0, "low"), (1, "scaled"), (3, "bottle")):
        dt.switch(apart, name)
        delta = next(delta for delta in dt.deltas(apart) if delta.name == name)
        optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            output(apart, {key: value[i : i + 1] for key, value in inputs.items()}).square().mean().backward()
            optimizer.step()
    for one, other in zip(dt.deltas(together), dt.deltas(apart), strict=True):
        for parameter, expected in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(parameter, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_autocast_keeps_to_its_precision() -> None:
    backbone = attached("bert")
    dt.switch(backbone, None)
    inputs = batch(len(ENTRIES))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = routed(backbone, ENTRIES, inputs), naive(backbone, ENTRIES, inputs)
    assert far(found.float(), [one.float() for one in expected]) < 0.03  # four roundings of 2^-8


@torch.no_grad()
def test_a_half_precision_backbone() -> None:
    backbone = attached("llama").to(torch.bfloat16)
    dt.switch(backbone, None)
    inputs = batch(len(ENTRIES))
    found, expected = routed(backbone, ENTRIES, inputs), naive(backbone, ENTRIES, inputs)
    assert found.dtype == torch.bfloat16
    assert far(found.float(), [one.float() for one in expected]) < 0.03


@torch.no_grad()
def test_another_thread_adds_and_removes_meanwhile() -> None:
    backbone = attached("llama")
    names = [f"n{k}" for k in range(6)]
    for seed, name in enumerate(names):
        shake(dt.attach(backbone, LoRA(rank=3), name=name), seed=seed)
    dt.switch(backbone, None)
    bank, inputs = dt.bank(backbone), batch(3)
    expected = naive(backbone, ["low", "bottle", None], inputs)
    stop, failures = threading.Event(), []

    def churn() -> None:
        try:
            while not stop.is_set():
                for name in names:
                    bank.add(name)
                for name in names:
                    bank.remove(name)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(6):
            assert far(routed(backbone, ["low", "bottle", None], inputs), expected) < 1e-5
    finally:
        stop.set()
        thread.join()
    assert not failures
