"""What a step needs, told before it: the shadow counts what a real step holds, the estimate leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue
from deltatune.methods import methods
from deltatune.methods.kinds import Method
from deltatune.methods.making import make
from deltatune.training import forecast as forecasting
from deltatune.training.estimate import estimate
from deltatune.training.forecast import Memory, Trial, forecast
from deltatune.training.freed import KEEPING, _glibc
from deltatune.training.heap import grown
from deltatune.training.live import held_bytes, live_tensors
from deltatune.training.settings import Settings
from deltatune.training.shadow import shadow_of
from deltatune.training.steps import Steps
from tests.training.tiny import backbone, data, same, tokenizer

ROWS, LENGTH = 8, 24
NOT_HERE = {"frozen": "trains nothing", "miss": "wants maps with sides that 64 divides", "trainable-tokens": "wants words"}
SHAPED: dict[str, dict[str, Any]] = {"prefix-tuning": {"num_virtual_tokens": 3}, "prompt-tuning": {"num_virtual_tokens": 3}}


def batch_of(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 101, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 3}


def steps_of(model: nn.Module, method: Method, settings: Settings | None = None) -> Steps:
    delta = dt.attach(model, method)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        out = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return nn.functional.cross_entropy(out.logits.flatten(0, -2)[: len(batch["labels"])].float(), batch["labels"])

    return Steps(model, [delta], loss, settings or Settings())


def held(steps: Steps) -> int:
    """High-water mark of the live tensors of two real steps."""
    batch = batch_of(ROWS)
    with live_tensors() as live:
        start = live.bytes
        live.peak = start
        with steps.taking() as step:
            step(batch)
            step(batch)
    return live.peak - start


@pytest.mark.parametrize("name", ["lora", "full", "bitfit", "ia3", "adapter", "prefix-tuning", "dora", "diff-pruning", "said"])
def test_a_shadow_holds_what_a_real_step_holds(name: str) -> None:
    steps = steps_of(backbone("bert"), make(name, SHAPED.get(name, {})))
    counted = forecasting._memory(steps, batch_of, ROWS)
    assert counted.counted == "shapes"
    assert counted.live == pytest.approx(held(steps), rel=0.05)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}, {"grad_accumulation": 3}], ids=str)
def test_settings_change_what_is_counted_as_they_change_the_step(options: dict[str, Any]) -> None:
    steps = steps_of(backbone("llama"), make("lora", {}), Settings(**options))
    plain = forecasting._memory(steps_of(backbone("llama"), make("lora", {})), batch_of, ROWS)
    counted = forecasting._memory(steps, batch_of, ROWS)
    assert counted.counted == "shapes"
    assert counted.live == pytest.approx(held(steps), rel=0.05)
    assert counted.live != plain.live


def test_a_shadow_has_no_bytes_and_leaves_the_backbone_as_it_is() -> None:
    model = backbone("bert")
    steps = steps_of(model, make("full", {}))
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    with shadow_of(steps) as shadow, shadow.taking() as step:
        assert shadow.backbone is not model and shadow.trained[0].backbone is shadow.backbone
        step(batch_of(ROWS))
    assert same(model.state_dict(), before) and torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.grad is None and type(parameter.data) is Tensor for parameter in model.parameters())


def test_where_numbers_are_needed_few_rows_are_continued_on_a_line() -> None:
    steps = steps_of(backbone("bert"), make("lora", {}))
    inner = steps.loss

    def peeking(module: nn.Module, batch: Any) -> Tensor:
        loss = inner(module, batch)
        return loss * 2 if loss.item() > 1e6 else loss  # a value decides what runs

    steps.loss = peeking
    counted = forecasting._memory(steps, batch_of, ROWS)
    assert counted.counted == "rows"
    assert counted.live == pytest.approx(held(steps), rel=0.15)


@pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")
def test_a_heap_grows_where_no_hole_is_large_enough() -> None:
    one, two = 2**20, 2**21
    between = one // 4  # larger than any hole that a young process has
    again = grown([(0, one), (1, between), (0, 0), (2, one // 2)], KEEPING)
    larger = grown([(0, one), (1, between), (0, 0), (2, two)], KEEPING)
    assert again is not None and larger is not None
    assert again < 1.6 * one and larger > 3.0 * one


def test_an_estimate_is_of_few_rows_where_a_step_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forecasting._affordable(16, 0.1, 2.0, 0) == (16,)
    assert forecasting._affordable(64, 0.2, 2.0, 0) == (5, 10)
    assert forecasting._affordable(64, 50.0, 2.0, 0) == (1, 2)
    monkeypatch.setattr(forecasting, "available", lambda: 10**9)
    assert forecasting._affordable(64, 0.001, 2.0, 10**10) == (2, 4), "the trial does not take what is not there"
    assert forecasting._line(2, 3.0, 5.0, 8) == 9.0
    assert forecasting._line(2, None, 5, 8) is None


def test_forecast_puts_the_parts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(backbone("bert"), make("lora", {}))
    monkeypatch.setattr(forecasting, "at_rest", lambda backbone: 50_000)
    monkeypatch.setattr(forecasting, "_memory", lambda steps, batch_of, rows: Memory(1_000, 2_000 * rows))
    monkeypatch.setattr(forecasting, "_trial", lambda steps, timed, rows, few: Trial((2, 4), 0.5, 0.7, 7_000))
    found = forecast(steps, batch_of, ROWS, delta_bytes=100, before=49_000)
    assert (found.live_bytes, found.rows, found.tokens) == (1_100, ROWS, (LENGTH, LENGTH))
    assert found.resident_bytes == 1_000 + 7_000 + 2_000 * (ROWS - 4)
    assert (found.timed_rows, found.seconds, found.counted) == ((2, 4), 0.5, "shapes")
    monkeypatch.setattr(forecasting, "_memory", lambda steps, batch_of, rows: Memory(1_000, None))
    assert forecast(steps, batch_of, ROWS, before=49_000).resident_bytes is None, "a C library that does not tell"


def test_a_process_grows_by_what_its_steps_touch_and_no_less_than_their_tensors() -> None:
    steps = steps_of(backbone("bert"), make("lora", {}))
    trial = forecasting._trial(steps, batch_of, ROWS, (ROWS,))
    assert trial.resident is not None and trial.resident > held(steps)
    few = forecasting._trial(steps, batch_of, ROWS, (2, 4))
    assert few.rows == (2, 4) and few.resident is not None and few.seconds > 0


def test_estimate_of_a_run_leaves_a_given_model_as_it_is() -> None:
    model = backbone("bert")
    before, random, bytes_before = copy.deepcopy(model.state_dict()), torch.random.get_rng_state(), held_bytes()
    modes = [module.training for module in model.modules()]
    found = estimate(model, data(), "lora", tokenizer=tokenizer(), batch_size=4)
    assert found.live_bytes > 0 and found.seconds > 0 and found.rows == 4
    assert found.tokens[0] >= found.tokens[1] > 0
    assert same(model.state_dict(), before) and dt.deltas(model) == []
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert held_bytes() == pytest.approx(bytes_before, abs=10_000)


def test_more_rows_take_more() -> None:
    few, many = (estimate(backbone("bert"), data(), "lora", tokenizer=tokenizer(), batch_size=size) for size in (2, 12))
    assert many.live_bytes > 2 * few.live_bytes


def test_what_cannot_be_estimated_says_so() -> None:
    with pytest.raises(InvalidValue, match="Nothing would train with this method"):
        estimate(backbone("bert"), data(), "frozen", tokenizer=tokenizer())
    with pytest.raises(InvalidValue, match="Estimate without it"):
        estimate(backbone("bert"), data(), "lora", tokenizer=tokenizer(), keep_frozen="memory")


def test_tensors_of_others_that_have_no_shape_are_in_nobodys_way() -> None:
    """A nested tensor and the weight of a lazy layer, alive somewhere in the process."""
    others = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), nn.LazyLinear(3)
    assert forecasting._memory(steps_of(backbone("bert"), make("lora", {})), batch_of, 2).counted == "shapes"
    assert held_bytes() > 0 and others


@pytest.mark.parametrize("name", sorted(set(methods) - set(NOT_HERE)))
def test_every_method_is_counted_by_its_shapes(name: str) -> None:
    steps = steps_of(backbone("bert"), make(name, SHAPED.get(name, {})))
    assert forecasting._memory(steps, batch_of, 2).counted == "shapes"
