"""AdamW over one vector steps as AdamW over many tensors, but for the last bit, and its state is that of the plain one."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import deltatune as dt
from deltatune.methods import BitFit
from deltatune.training.flat import FEWEST, FlatAdamW
from tests.multi.alone import WITHOUT
from tests.training import tiny

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def many(dtype: torch.dtype = torch.float32, count: int = FEWEST + 3) -> list[nn.Parameter]:
    """Tensors of several shapes, a scalar and an empty one among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (5,), (3, 4), (2, 3, 2)]
    return [nn.Parameter(torch.randn(shapes[k % len(shapes)], generator=generator).to(dtype)) for k in range(count)]


def groups(own: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups that both lie flat, with rates of their own."""
    return [{"params": own[0::2]}, {"params": own[1::2], "lr": 1e-2, "weight_decay": 0.0}]


def grads(own: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in own:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def lies_flat(own: list[nn.Parameter]) -> bool:
    return len({parameter.untyped_storage().data_ptr() for parameter in own if parameter.numel()}) <= 2


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        grads(own, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def pair() -> tuple[list[nn.Parameter], FlatAdamW, list[nn.Parameter], AdamW]:
    own, others = many(count=2 * FEWEST + 3), many(count=2 * FEWEST + 3)
    return own, FlatAdamW(groups(own), **SETTINGS), others, AdamW(groups(others), fused=True, **SETTINGS)


Pair = tuple[list[nn.Parameter], FlatAdamW, list[nn.Parameter], AdamW]


def same(one: list[nn.Parameter], other: list[nn.Parameter], most: float = 1e-6) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=most) for a, b in zip(one, other, strict=True))


def test_it_steps_as_the_plain_one(pair: Pair) -> None:
    own, flat, others, plain = pair
    run(flat, own, range(7))
    run(plain, others, range(7))
    assert lies_flat(own) and not lies_flat(others)
    assert same(own, others)
    flat.release()
    assert not lies_flat(own) and same(own, others)


def test_its_state_is_that_of_the_plain_one(pair: Pair) -> None:
    own, flat, others, plain = pair
    run(flat, own, range(3))
    run(plain, others, range(3))
    mine, theirs = flat.state_dict(), plain.state_dict()
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert all(torch.allclose(mine["state"][number][name], state[name], rtol=0, atol=1e-6) for name in state)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    assert buffer.tell() < 40_000 + 3 * 4 * sum(parameter.numel() for parameter in own) + 2_000 * len(own), (
        "no vector is saved with every view"
    )


def test_it_goes_on_from_its_state(pair: Pair) -> None:
    own, flat, others, plain = pair
    run(flat, own, range(3))
    again = FlatAdamW(groups(own), **SETTINGS)
    again.load_state_dict(flat.state_dict())
    run(again, own, range(3, 7))
    run(plain, others, range(7))
    assert lies_flat(own) and same(own, others)


def test_a_copy_is_one_of_its_own(pair: Pair) -> None:
    own, flat, _, _ = pair
    run(flat, own, range(3))
    before = [parameter.detach().clone() for parameter in own]
    kept = copy.deepcopy(flat)
    copies = [parameter for group in kept.param_groups for parameter in group["params"]]
    run(kept, copies, range(2))
    assert same(own, before, 0.0) and lies_flat(copies) and not same(copies, [*own[0::2], *own[1::2]])


def test_a_parameter_without_a_gradient_stays_as_it_is(pair: Pair) -> None:
    own, flat, others, plain = pair
    for optimizer, parameters in ((flat, own), (plain, others)):
        run(optimizer, parameters, range(2))
        for step in range(2, 6):
            grads(parameters, step)
            if step == 3:
                parameters[3].grad = None
            optimizer.step()
    assert same(own, others)
    assert float(flat.state_dict()["state"][FEWEST + 3]["step"]) in (5.0, 6.0)


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_few_tensors_go_the_plain_way(count: int) -> None:
    own, others = many(count=count), many(count=count)
    run(FlatAdamW(own, **SETTINGS), own, range(2))
    run(AdamW(others, **SETTINGS), others, range(2))
    assert same(own, others) and own[0].untyped_storage().nbytes() == 4


def test_each_group_goes_its_own_way() -> None:
    """Two tensors beside many, as a composition's mixers are."""
    own, others = many(), many()
    flat, plain = (
        kind([{"params": one[:2], "lr": 1e-2}, {"params": one[2:]}], **SETTINGS) for kind, one in ((FlatAdamW, own), (AdamW, others))
    )
    run(flat, own, range(4))
    first = [vector for vector in flat._vectors if vector is not None]
    run(flat, own, range(4, 6))
    run(plain, others, range(6))
    assert same(own, others) and [vector for vector in flat._vectors if vector is not None] == first and len(first) == 1


def test_what_was_given_other_memory_is_laid_anew(pair: Pair) -> None:
    own, flat, others, plain = pair
    for optimizer, parameters in ((flat, own), (plain, others)):
        run(optimizer, parameters, range(2))
        parameters[2].data = torch.ones_like(parameters[2])
        run(optimizer, parameters, range(2, 4))
    assert same(own, others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    own, others = many(dtype), many(dtype)
    run(FlatAdamW(own, **SETTINGS), own, range(3))
    run(AdamW(others, fused=True, **SETTINGS), others, range(3))
    assert lies_flat(own) and same(own, others, 1e-2 if dtype == torch.bfloat16 else 1e-12)


def test_a_training_ends_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many biases; what trained flat is what trained plainly, and one delta can go without holding the others' memory."""
    taken: list[bool] = []
    whole = FlatAdamW.step

    def step(self: FlatAdamW, closure: Any = None) -> Any:
        found = whole(self, closure)
        taken.append(all(vector is not None for vector in self._vectors))
        return found

    monkeypatch.setattr(FlatAdamW, "step", step)
    ends: list[dict[str, Tensor]] = []
    for fewest in (2, 10_000):
        monkeypatch.setattr("deltatune.training.flat.FEWEST", fewest)
        model = tiny.backbone("bert")
        options: dict[str, Any] = {"max_steps": 5, "evaluations": 1, "batch_size": 4, "lr": 1e-2, "progress": "none"}
        [delta] = dt.train(model, tiny.data(), BitFit(), tokenizer=tiny.tokenizer(), **options).deltas
        ends.append(delta.state_dict())
        storages = [parameter.untyped_storage().data_ptr() for parameter in delta.parameters()]
        assert len(set(storages)) == len(storages)
    assert taken == [True] * 5 + [False] * 5
    seen = [name for name in ends[0] if name not in WITHOUT]
    assert all(torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-6) for name in seen)
