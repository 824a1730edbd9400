"""What a bank holds is what the deltas are: whatever comes, goes, is written or fails, and while a route is open, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.errors import Unsupported
from deltatune.methods import BitFit, LoRA, ParallelAdapter, PrefixTuning
from deltatune.multi.bank import Bank
from deltatune.multi.table import Table
from tests.conformance.cells import fresh, shake
from tests.models import output
from tests.multi.rows import batch, far, naive, routed

BOTH = ["attention.query", "feed_forward.up"]


def holding(model: str, *names: str, **options: Any) -> nn.Module:
    """A model with a LoRA of each name, all at rest."""
    backbone, _ = fresh(model)
    with torch.no_grad():
        for k, name in enumerate(names):
            shake(dt.attach(backbone, LoRA(rank=2, **options), name=name, head=False), seed=k, spread=0.3)
    dt.switch(backbone, None)
    return backbone


def delta(backbone: nn.Module, name: str) -> Any:
    return next(own for own in dt.deltas(backbone) if own.name == name)


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(rank=2), BitFit()], ids=["with a head", "selected in place"])
def test_what_is_enabled_can_be_added(method: Any) -> None:
    backbone, _ = fresh("bert")
    shake(dt.attach(backbone, method, name="live"), spread=0.3)
    dt.bank(backbone).add("live")
    assert far(routed(backbone, ["live"], batch(1)), naive(backbone, ["live"], batch(1))) < 1e-5
    dt.switch(backbone, "live")
    if isinstance(method, LoRA):
        dt.bank(backbone).head("live", {"weight": torch.zeros(5, 32), "bias": torch.zeros(5)})
        assert routed(backbone, ["live"], batch(1)).shape[-1] == 5


@torch.no_grad()
@pytest.mark.parametrize("known", [False, True])
def test_what_an_error_left_half_entered_is_entered_anew(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, entered = holding("bert", "a"), 0
    whole = Table.enter
    if known:
        dt.bank(backbone).add("a")
        shake(delta(backbone, "a"), seed=7, spread=0.3)

    def dies(self: Table, *args: Any) -> None:
        nonlocal entered
        entered += 1
        if entered == 3:
            raise MemoryError
        whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "enter", dies)
        with pytest.raises(MemoryError):
            dt.bank(backbone).add("a")
    assert ("a" in dt.bank(backbone)) == known
    assert far(routed(backbone, ["a"], batch(1)), naive(backbone, ["a"], batch(1))) < 1e-5


@torch.no_grad()
def test_what_was_written_past_all_counters_is_seen_behind_refresh() -> None:
    backbone, inputs = holding("bert", "a"), batch(1)
    routed(backbone, ["a"], inputs)
    with dt.route(backbone, ["a"]):
        before = output(backbone, inputs)
        for parameter in delta(backbone, "a").parameters():
            parameter.data.mul_(3)
        dt.refresh(backbone)
        within = output(backbone, inputs)
    assert far(within, before.unbind()) > 1e-3
    assert far(within, naive(backbone, ["a"], inputs)) < 1e-5
    assert far(routed(backbone, ["a"], inputs), naive(backbone, ["a"], inputs)) < 1e-5


@pytest.mark.parametrize("gradients", [False, True])
def test_a_route_follows_the_backbone_into_eval(gradients: bool) -> None:
    backbone, inputs = holding("bert", "a", dropout=0.5), batch(2)
    backbone.train()
    with dt.route(backbone, ["a", "a"]), torch.set_grad_enabled(gradients):
        backbone.eval()
        once, again = output(backbone, inputs), output(backbone, inputs)
    assert torch.equal(once, again)
    with torch.no_grad():
        assert far(once.detach(), naive(backbone, ["a", "a"], inputs)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("how", ["removed", "removed, another written", "removed, backbone written"])
def test_a_delta_that_leaves_the_bank_stays_with_its_route(how: str) -> None:
    backbone, inputs = holding("bert", "a", "c"), batch(2, padding=False)
    with dt.route(backbone, ["a", "c"]):
        before = output(backbone, inputs)
        dt.bank(backbone).remove("a")
        if "another" in how:
            next(iter(delta(backbone, "c").parameters())).mul_(1.0)
        if "backbone" in how:
            dt.refresh(backbone)
        after = output(backbone, inputs)
    assert torch.equal(after, before)
    dt.bank(backbone).remove("a")
    assert "a" not in dt.bank(backbone)


def test_what_trains_stays_with_its_route_too() -> None:
    backbone, inputs = holding("bert", "t"), batch(1)
    delta(backbone, "t").enable()
    with dt.route(backbone, ["t"]):
        output(backbone, inputs).sum().backward()
        expected = [parameter.grad.clone() for parameter in delta(backbone, "t").parameters()]
        backbone.zero_grad()
        dt.bank(backbone).remove("t")
        output(backbone, inputs).sum().backward()
    assert all(torch.equal(parameter.grad, own) for parameter, own in zip(delta(backbone, "t").parameters(), expected, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_delta_that_is_detached_within_its_route_is_missed(gradients: bool) -> None:
    backbone, inputs = holding("bert", "a", "c"), batch(2)
    with dt.route(backbone, ["a", "c"]), torch.set_grad_enabled(gradients):
        output(backbone, inputs)
        dt.detach(delta(backbone, "a"))
        with pytest.raises(Unsupported, match="`a` was detached while a route"):
            output(backbone, inputs)
    with torch.no_grad():
        assert far(routed(backbone, ["c", None], inputs), naive(backbone, ["c", None], inputs)) < 1e-5


@torch.no_grad()
def test_a_route_is_planned_anew_only_where_something_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, plans = holding("bert", "a"), []
    dt.bank(backbone).add("a")
    somebody = nn.Parameter(torch.ones(1))
    somebody.grad = torch.ones(1)
    torch.optim.SGD([somebody]).step()
    whole = Bank._plan
    monkeypatch.setattr(Bank, "_plan", lambda self, *args, **options: plans.append(1) or whole(self, *args, **options))
    with dt.route(backbone, ["a"]):
        for _ in range(3):
            output(backbone, batch(1))
        torch.optim.SGD([somebody]).step()
        for _ in range(3):
            output(backbone, batch(1))
    assert len(plans) == 1


@torch.no_grad()
@pytest.mark.parametrize("other", [LoRA(rank=2), ParallelAdapter(3)], ids=["LoRA", "another branch"])
def test_a_branch_does_not_need_its_neighbours(other: Any) -> None:
    backbone, _ = fresh("bert")
    shake(dt.attach(backbone, ParallelAdapter(3), name="p", head=False), seed=1)
    where = BOTH if isinstance(other, LoRA) else None
    shake(neighbour := dt.attach(backbone, other, where, name="low", head=False))
    dt.switch(backbone, None)
    inputs = batch(2)
    expected = naive(backbone, ["p", None], inputs)
    routed(backbone, ["p", "low"], inputs)
    dt.detach(neighbour)
    assert far(routed(backbone, ["p", None], inputs), expected) < 1e-5
    dt.bank(backbone).remove("p")
    assert far(routed(backbone, ["p", None], inputs), expected) < 1e-5


@torch.no_grad()
def test_what_comes_and_goes_leaves_nothing() -> None:
    backbone, _ = fresh("bert")
    shake(dt.attach(backbone, LoRA(rank=2), [*BOTH, "feed_forward.down"], name="low", head=False))
    for method in (ParallelAdapter(3), PrefixTuning(2, reparameterization=False)) * 2:
        guest = dt.attach(backbone, method, name="guest", head=False)
        with dt.route(backbone, ["guest", "low"]):
            last = backbone.bert.encoder.layer[-1].output.dense  # type: ignore[union-attr]
            handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                output(backbone, batch(2))
            handle.remove()
        bank = dt.bank(backbone)
        assert not any(given._held for act in bank.acts.values() for given in act.begins)
        dt.detach(guest)
        assert not bank.contexts and not any(act.begins for act in bank.acts.values())


@torch.no_grad()
def test_a_head_may_go_while_a_forward_runs() -> None:
    backbone = holding("bert", "low", "own")
    bank, classifier = dt.bank(backbone), backbone.classifier
    bank.head("own", {"weight": torch.randn(5, 32), "bias": torch.zeros(5)})
    dt.attach(backbone, LoRA(rank=2), "attention.query", name="other", head=False)
    slot: Any = classifier.deltatune  # type: ignore[union-attr]
    act = next(iter(slot.acts.values()))
    whole = act.before
    act.before = lambda *call: bank.remove("own") or whole(*call)
    assert routed(backbone, ["low"], batch(1)).shape == (1, 3)
    assert "deltatune" not in classifier._modules  # type: ignore[union-attr]
