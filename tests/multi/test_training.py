"""Gradient checkpointing, autocast and another thread beside a route."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import Busy
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


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_what_is_computed_anew_reads_the_lanes_of_its_forward(reentrant: bool) -> None:
    """The frozen delta has left the bank meanwhile, and others have come; once the graph is gone its lane is used again."""
    gradients = []
    for others_come in (False, True):
        backbone = attached()
        frozen = next(delta for delta in dt.deltas(backbone) if delta.name == "low")
        frozen.freeze()
        for seed in range(3):
            with torch.no_grad():
                shake(dt.attach(backbone, LoRA(rank=3), name=f"n{seed}", head=False), seed=10 + seed, spread=0.3)
        backbone.train()
        backbone.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            backbone.enable_input_require_grads()  # type: ignore[operator]
        bank = dt.bank(backbone)
        bank.add("n0")
        with dt.route(backbone, [["bottle", "low"]] * 2):
            loss = output(backbone, batch(2)).square().mean()
        if others_come:
            bank.remove("low")
            for name in ("n1", "n2"):
                bank.add(name)
        loss.backward()
        gradients.append([parameter.grad for delta in dt.deltas(backbone) if delta.name == "bottle" for parameter in delta.parameters()])
        del loss
        gc.collect()
        assert bank.opened.numbers == []
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("rows", [["a", "a"], ["a", "b"], [f"d{k}" for k in range(20)]], ids=["one", "two", "many"])
def test_a_backward_does_not_mind_what_is_entered_meanwhile(rows: list[str], tokens: int) -> None:
    backbone, _ = fresh("mlp")
    with torch.no_grad():
        for seed, name in enumerate(dict.fromkeys([*rows, "c", "d"])):
            shake(dt.attach(backbone, LoRA(rank=8), ["0"], name=name), seed=seed, spread=0.3)
    for delta in dt.deltas(backbone):
        delta.freeze()
    bank, found = dt.bank(backbone), []
    bank.add("c")
    for meanwhile in (False, True):
        x = torch.randn(len(rows), tokens, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with dt.route(backbone, rows):
            loss = backbone(x).square().sum()
        if meanwhile:
            for name in dict.fromkeys(rows):
                bank.remove(name)
            bank.add("d")
        loss.backward()
        found.append(x.grad)
    assert torch.equal(*found)


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


def test_gradients_in_half_precision_are_those_of_the_rows_alone() -> None:
    backbone, inputs = attached().bfloat16(), batch(4)
    entries, expected = ["low", "bottle", None, "scaled"], {}  # type: tuple[list[str | None], dict[str, Tensor]]
    for place, name in enumerate(entries):
        if name is None:
            continue
        dt.switch(backbone, name)
        output(backbone, {key: value[place : place + 1] for key, value in inputs.items()}).float().square().mean().backward()
        own = next(delta for delta in dt.deltas(backbone) if delta.name == name)
        expected[name] = torch.cat([parameter.grad.flatten().float() for parameter in own.parameters() if parameter.grad is not None])
        backbone.zero_grad()
    for delta in dt.deltas(backbone):
        delta.enable()
    with dt.route(backbone, entries):
        output(backbone, inputs).float().square().flatten(1).mean(1).sum().backward()
    for delta in dt.deltas(backbone):
        if delta.name in expected:
            found = torch.cat([parameter.grad.flatten().float() for parameter in delta.parameters() if parameter.grad is not None])
            assert float((found - expected[delta.name]).norm() / expected[delta.name].norm()) < 0.05


@torch.no_grad()
def test_a_second_thread_is_told_that_the_first_computes() -> None:
    backbone = attached("llama")
    dt.switch(backbone, None)
    inputs, errors = batch(1), []
    expected = naive(backbone, ["low"], inputs)

    def second() -> None:
        for entries in (["scaled"], None):
            try:
                if entries is None:
                    output(backbone, inputs)
                else:
                    routed(backbone, entries, inputs)
            except Busy as error:
                errors.append(str(error))

    with dt.route(backbone, ["low"]):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert far(output(backbone, inputs), expected) < 1e-5
    assert len(errors) == 2 and "open the route in the thread that computes" in errors[0]
    second()
    assert len(errors) == 2


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
                for name in [*names, "low", "bottle"]:
                    bank.add(name)
                for name in [*names[::2], "low", *names[1::2]]:  # of what the route uses, too
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
