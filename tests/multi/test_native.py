"""The compiled operator equals the others, and is taken where it fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.methods import Adapter, LoRA
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import GATHER, NATIVE, SEGMENT, choose
from deltatune.multi.picks import Picks

pytestmark = pytest.mark.usefixtures("compiled")


def lanes_of(width: int, rank: int, out: int, picks: tuple[int, ...] = (1, 0, 3, 3, 2)) -> Lanes:
    A, B = torch.randn(4, width, rank) / width**0.5, torch.randn(4, rank, out) / rank**0.5
    A[0] = B[0] = 0
    return Lanes({"A": A, "B": B}, Picks(picks, torch.device("cpu")))


@pytest.mark.parametrize(("width", "rank", "out"), [(48, 4, 37), (1100, 16, 512), (65, 64, 66), (3, 7, 9), (512, 8, 512)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_equals_the_batched_product(tokens: int, width: int, rank: int, out: int) -> None:
    x, lanes = torch.randn(5, tokens, width), lanes_of(width, rank, out)
    for found, wanted in (
        (NATIVE.matrix(x, lanes, "A"), SEGMENT.matrix(x, lanes, "A")),
        (NATIVE.pair(x, lanes, "A", "B"), SEGMENT.pair(x, lanes, "A", "B")),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    y = torch.randn(5, tokens, out)
    before, step = y.clone(), NATIVE.shortcut(y, lanes, "A", "B")
    assert step is not None
    step(x, y)
    torch.testing.assert_close(y, before + SEGMENT.pair(x, lanes, "A", "B"), atol=1e-5, rtol=1e-5)
    assert torch.equal(y[1], before[1])


def test_the_zero_lane_of_a_single_product_is_read() -> None:
    lanes = Lanes({"W": torch.ones(2, 3, 2)}, Picks((0, 1), torch.device("cpu")))
    assert (NATIVE.matrix(torch.ones(2, 1, 3), lanes, "W") == 3).all()


def test_it_runs_where_it_fits() -> None:
    many = tuple(range(1, 33))
    tensors = {"A": torch.zeros(33, 16, 8), "B": torch.zeros(33, 8, 16)}
    lanes, x = Lanes(tensors, Picks(many, torch.device("cpu"))), torch.zeros(32, 1, 16)
    assert choose(x, lanes, "A", 8) is NATIVE
    assert choose(x.double(), lanes, "A", 8) is GATHER
    assert choose(x.requires_grad_(), lanes, "A", 8) is SEGMENT
    mapped = torch.func.vmap(lambda part: torch.tensor(float(choose(part[None, None], lanes, "A", 8) is GATHER)))
    assert mapped(torch.zeros(2, 16)).all()


def test_rows_decode_as_alone() -> None:
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    names: list[str | None] = [f"d{k}" for k in range(20)]
    for k, name in enumerate(names):
        delta = dt.attach(model, LoRA(rank=4) if k % 2 else Adapter(8), name=name)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.normal_(std=0.2)
    ids = torch.randint(0, 50, (21, 4))
    chosen = [*names, None]
    with torch.no_grad(), dt.route(model, chosen):
        found = decoded(model, ids)
    for k, name in enumerate(chosen):
        dt.switch(model, name)
        with torch.no_grad():
            torch.testing.assert_close(found[k : k + 1], decoded(model, ids[k : k + 1]), atol=1e-5, rtol=1e-5)


def decoded(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of cached steps, token by token."""
    cache, found = None, []
    for position in range(ids.shape[1]):
        done = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = done.past_key_values
        found.append(done.logits)
    return torch.cat(found, 1)
