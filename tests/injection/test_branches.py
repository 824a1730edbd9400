"""Branches: what a sub-layer was given reaches the patch at its end, is let go there, and nothing else notices."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.branches import BranchAct
from deltatune.injection.compose import compose
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import slot_of
from deltatune.methods import IA3, LoRA, MultiHeadParallelAdapter, ParallelAdapter
from tests.conformance.cells import fresh, shake
from tests.conformance.trace import trace
from tests.models import output


def held(backbone: nn.Module) -> list[Tensor]:
    """Whatever branches keep at this moment."""
    slots = [slot for module in list(backbone.modules()) if (slot := slot_of(module)) is not None]
    acts = [act for slot in slots for act in slot.acts.values() if isinstance(act, BranchAct)]
    assert acts
    return [x for act in acts for given in act.givens for x in given._held.values()]


def attached(method: Any = None, model: str = "bert") -> tuple[nn.Module, dict[str, Tensor], Any]:
    backbone, inputs = fresh(model)
    delta = attach(backbone, method or ParallelAdapter(bottleneck_dim=4), head=False)
    shake(delta, spread=0.3)
    return backbone, inputs, delta


@pytest.mark.parametrize("method", [ParallelAdapter(bottleneck_dim=4), MultiHeadParallelAdapter(bottleneck_dim=2)], ids=["output", "input"])
def test_nothing_is_kept_behind_a_forward(method: Any) -> None:
    backbone, inputs, _ = attached(method)
    seen: list[weakref.ref[Tensor]] = []
    query = backbone.get_submodule("bert.encoder.layer.0.attention.self.query")
    handle = query.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        output(backbone, inputs)
    handle.remove()
    gc.collect()
    assert held(backbone) == []
    assert seen[0]() is None


def test_nothing_is_kept_behind_an_error_between_beginning_and_end() -> None:
    backbone, inputs, delta = attached()
    expected = output(backbone, inputs).detach()
    middle = backbone.get_submodule("bert.encoder.layer.1.intermediate")

    def fail(*_: object) -> None:
        assert len(held(backbone)) == 1, "the feed-forward network of layer 1 has begun"
        raise RuntimeError("out of memory")

    handle = middle.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        output(backbone, inputs)
    handle.remove()
    assert held(backbone) == []
    torch.testing.assert_close(output(backbone, inputs), expected)
    hooks = len(backbone._forward_hooks)
    detach(delta)
    assert len(backbone._forward_hooks) < hooks


def test_the_end_of_a_sub_layer_alone_says_so() -> None:
    backbone, _, delta = attached()
    down = backbone.get_submodule("bert.encoder.layer.0.output.dense")
    with pytest.raises(Unsupported, match="first projection was not called before its last one"):
        down(torch.zeros(1, 2, 48))
    delta.disable()
    assert down(torch.zeros(1, 2, 48)).shape == (1, 2, 32)


def test_x_is_what_the_caller_gave_whatever_acts_at_the_first_projection() -> None:
    backbone, inputs, delta = attached()
    path = "bert.encoder.layer.0.intermediate.dense"
    attach(backbone, LoRA(rank=2), path, name="low", head=False)
    scaled = attach(backbone, IA3(), path, name="scaled", head=False)
    shake(scaled, spread=0.5)
    up, down = backbone.get_submodule(path), backbone.get_submodule("bert.encoder.layer.0.output.dense")
    seen: dict[str, Tensor] = {}
    handles = [
        up.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]), prepend=True),
        down.register_forward_hook(lambda _, args, y: seen.update(h=args[0], y=y)),
    ]
    output(backbone, inputs)
    for handle in handles:
        handle.remove()
    bottleneck = next(entry.patch for entry in delta.entries if entry.site.module is down).bottleneck
    plain = F.linear(seen["h"], down.weight, down.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(seen["y"], plain + bottleneck(seen["x"]))  # type: ignore[operator]


def test_side_by_side_by_the_formula() -> None:
    """Output branch, input branch and LoRA at the same output projection: y + sum_i w_i (F_i(x) - y)."""
    where = "bert.encoder.layer.1.attention.output.dense"
    backbone, inputs = fresh("bert")
    methods = {"a": ParallelAdapter(bottleneck_dim=4), "b": MultiHeadParallelAdapter(bottleneck_dim=2), "c": LoRA(rank=2)}
    deltas = {name: attach(backbone, method, where, name=name, head=False) for name, method in methods.items()}
    last = backbone.get_submodule(where)
    seen: list[Tensor] = []
    last.register_forward_hook(lambda _, args, y: seen.append(y))
    for k, delta in enumerate(deltas.values()):
        shake(delta, spread=0.4, seed=k)
        delta.disable()
    with torch.no_grad():
        output(backbone, inputs)
        for delta in deltas.values():
            delta.enable()
            output(backbone, inputs)
            delta.disable()
        compose(backbone, list(deltas), "weighted", weights=[0.5, 2.0, -1.0])
        output(backbone, inputs)
    y, *alone, together = seen
    expected = y + sum(w * (z - y) for w, z in zip([0.5, 2.0, -1.0], alone, strict=True))
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    assert held(backbone) == []


def test_others_merge_beside_a_branch() -> None:
    """At its beginning anything merges; at its end what adds up does, and what would see another input does not."""
    backbone, inputs, _ = attached()
    for path in ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"):
        delta = attach(backbone, LoRA(rank=2), path, head=False)
        shake(delta, spread=0.3)
        expected = output(backbone, inputs).detach()
        merge(delta)
        torch.testing.assert_close(output(backbone, inputs), expected, atol=1e-5, rtol=1e-5)
        unmerge(delta)
    backbone, _, branch = attached(MultiHeadParallelAdapter(bottleneck_dim=2))
    delta = attach(backbone, LoRA(rank=2), "bert.encoder.layer.0.attention.output.dense", head=False)
    with pytest.raises(Unsupported, match=r"MultiHeadParallel acts inside it .* do not commute"):
        merge(delta)
    with pytest.raises(Unsupported, match=r"MultiHeadParallel at .* is no change of a weight"):
        merge(branch)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_of_a_forward_holds_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    backbone, inputs, _ = attached()
    with torch.no_grad():
        expected = output(backbone, inputs)
        backbone.get_submodule("bert.encoder.layer.0.intermediate.dense")(torch.zeros(1, 2, 32))
        assert len(held(backbone)) == 1
        other = copied(backbone)
        assert held(other) == []
        assert torch.equal(output(other, inputs), expected)
        assert len(held(backbone)) == 1
        assert torch.equal(output(backbone, inputs), expected)
    assert held(backbone) == []


def test_two_deltas_share_a_beginning_and_leave_in_any_order() -> None:
    backbone, inputs = fresh("gpt2")
    before = trace(backbone)
    a = attach(backbone, ParallelAdapter(bottleneck_dim=4), name="a", head=False)
    b = attach(backbone, MultiHeadParallelAdapter(bottleneck_dim=2), name="b", head=False)
    shake(b)
    detach(a)
    output(backbone, inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in b.parameters())
    assert held(backbone) == []
    detach(b)
    assert trace(backbone).differences(before) == []
