"""What does a batch cost in which each row uses its own delta? The plain backbone, PEFT's mixed batch and PEFT's switching beside ours.

The figures S1 to S7 of issue 6, on Llamas with random weights (*S*: width 512, 8 layers; *M*: width 1024, 12 layers), LoRA on all
seven linear maps. A decode step is one token a row behind 64 cached ones; a route is opened once for many steps, as an engine and
``generate`` do, so its opening and its second step, in which matrices are copied, are given apart. The plain backbone is one to which
nothing was ever attached; what attached deltas cost that rest is given beside it. Ours runs the operator that ``deltatune operators
compile`` compiles; what it takes without stands beside it. ``many.py S M`` measures both sizes; ``many.py --smoke`` only sees that
everything runs.

Beside each figure stands its floor on this machine: the plain backbone's step, and for many deltas the bytes of the lanes in use at
the memory bandwidth that is measured beside it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import peft
import torch
from paired import interleave, ratio, report, timed
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.compiled.library import compile_library
from deltatune.methods import LoRA
from deltatune.multi.operators.native import Native
from deltatune.multi.routing import Entry

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLES = ["attention.*", "feed_forward.*"]
ROWS, CACHED, PREFILL, STEPS = 32, 64, 32, 3
BARS = {"S1": 4.0, "S2": 2.0, "S3": 30.0, "S4": 1.20, "S5": 1.10, "S6": 1.10}
PREFILL_BARS = {"S": 1.7, "M": 1.3}


@dataclass(frozen=True)
class Size:
    """A backbone and what is loaded on it."""

    width: int
    feed_forward: int
    layers: int
    rank: int
    loaded: int


SIZES = {"S": Size(512, 1376, 8, 8, 64), "M": Size(1024, 2752, 12, 16, 32), "tiny": Size(64, 128, 2, 4, 34)}


def backbone(size: Size) -> LlamaForCausalLM:
    heads = max(size.width // 64, 1)
    shape = dict(hidden_size=size.width, intermediate_size=size.feed_forward, num_hidden_layers=size.layers, num_attention_heads=heads)
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, max_position_embeddings=256, **shape)).eval()


def loaded(size: Size, number: int, where: list[str]) -> nn.Module:
    """A backbone with so many random LoRAs, none of them active."""
    model = backbone(size)
    for k in range(number):
        delta = dt.attach(model, LoRA(rank=size.rank), where, name=f"d{k}")
        delta.disable()
    with torch.no_grad():
        for delta in dt.deltas(model):
            for name, parameter in delta.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.02)
    for k in range(number):
        dt.bank(model).add(f"d{k}")
    return model


def theirs(size: Size) -> Any:
    """PEFT's model with as many."""
    config = peft.LoraConfig(r=size.rank, target_modules=list(TARGETS), init_lora_weights=False)
    model = peft.get_peft_model(backbone(size), config, adapter_name="d0")
    for k in range(1, size.loaded):
        model.add_adapter(f"d{k}", config)
    return model.eval()


def chosen(size: Size) -> list[Entry]:
    """As many of the loaded ones as there are rows, in any order."""
    return list(random.Random(0).sample([f"d{k}" for k in range(size.loaded)], ROWS))


def cached(model: nn.Module, rows: int) -> Callable[..., Any]:
    """A decode step: one token a row behind the cached ones."""
    cache = DynamicCache()
    model(input_ids=torch.zeros(rows, CACHED, dtype=torch.long), past_key_values=cache, use_cache=True)
    ids = torch.ones(rows, 1, dtype=torch.long)

    def step(**options: Any) -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        cache.crop(-1)

    return step


def within(model: nn.Module, entries: list[Entry], work: Callable[[], Any], ahead: int = 2, times: int = STEPS) -> Callable[[], float]:
    """Seconds of the work within an open route, so many calls behind its first."""

    def measured() -> float:
        with dt.route(model, entries):
            for _ in range(ahead):
                work()
            return timed(lambda: [work() for _ in range(times)]) / times

    return measured


def uncompiled(work: Callable[[], float]) -> Callable[[], float]:
    """The same as if nothing had been compiled."""

    def measured() -> float:
        with patch.object(Native, "is_available", return_value=False):
            return work()

    return measured


def plain(work: Callable[[], Any], ahead: int = 2, times: int = STEPS) -> Callable[[], float]:
    """Seconds of the work without a route, as above."""

    def measured() -> float:
        for _ in range(ahead):
            work()
        return timed(lambda: [work() for _ in range(times)]) / times

    return measured


def in_turn(model: Any, step: Callable[..., Any]) -> Callable[[], float]:
    """PEFT's other way: switch to each row's adapter and compute the row alone."""

    def work() -> None:
        for k in range(ROWS):
            model.set_adapter(f"d{k}")
            step()

    return lambda: timed(work)


@torch.no_grad()
def decode(size: Size, rounds: int, bare: nn.Module, model: nn.Module, other: Any) -> dict[str, Any]:
    """S1 to S5 for one size."""
    names = chosen(size)
    step, mixed, alone = cached(model, ROWS), cached(other.base_model.model, ROWS), cached(other.base_model.model, 1)

    def peft_step() -> None:
        with other._enable_peft_forward_hooks(adapter_names=names):
            mixed()

    competitors: Mapping[str, Callable[[], float]] = {
        "backbone": plain(cached(bare, ROWS)),
        "resting": plain(step),
        "ours": within(model, names, step),
        "ours, second step": within(model, names, step, 1, 1),
        "ours, not compiled": uncompiled(within(model, names, step)),
        "one": within(model, ["d0"] * ROWS, step),
        "peft": plain(peft_step, 1),
        "peft in turn": in_turn(other, alone),
    }
    seconds = interleave(competitors, rounds)
    opening = [timed(lambda: _open(model, names)) for _ in range(rounds)]
    return {
        "S1" if size.width == 512 else "S2": round(ratio(seconds["peft"], seconds["ours"]), 2),
        "S3": round(ratio(seconds["peft in turn"], seconds["ours"]), 1),
        "S4": round(ratio(seconds["ours"], seconds["backbone"]), 3),
        "S5": round(ratio(seconds["ours"], seconds["one"]), 3),
        "S4, not compiled": round(ratio(seconds["ours, not compiled"], seconds["backbone"]), 3),
        "deltas at rest / backbone": round(ratio(seconds["resting"], seconds["backbone"]), 3),
        "floor of S4": round(1 + lane_bytes(model) * ROWS / bandwidth() / statistics.median(seconds["backbone"]), 3),
        "milliseconds": {name: round(1e3 * statistics.median(times), 1) for name, times in seconds.items()},
        "opening a route, ms": round(1e3 * statistics.median(opening), 1),
    }


@torch.no_grad()
def prefill(size: Size, rounds: int, bare: nn.Module, model: nn.Module, other: Any) -> dict[str, Any]:
    """S7: rows of 32 tokens."""
    names = chosen(size)
    ids = torch.ones(ROWS, PREFILL, dtype=torch.long)

    def peft_step() -> None:
        with other._enable_peft_forward_hooks(adapter_names=names):
            other.base_model.model(input_ids=ids, use_cache=False)

    competitors = {
        "backbone": plain(lambda: bare(input_ids=ids, use_cache=False), 1, 1),
        "ours": within(model, names, lambda: model(input_ids=ids, use_cache=False), 1, 1),
        "peft": plain(peft_step, 1, 1),
    }
    seconds = interleave(competitors, rounds)
    return {
        "S7": round(ratio(seconds["peft"], seconds["ours"]), 2),
        "prefill / backbone": round(ratio(seconds["ours"], seconds["backbone"]), 3),
        "prefill, milliseconds": {name: round(1e3 * statistics.median(times), 1) for name, times in seconds.items()},
    }


@torch.no_grad()
def crowded(size: Size, rounds: int, many: int) -> dict[str, Any]:
    """S6: many loaded, beside as many as are used; LoRA at queries and values, so that they fit into memory."""
    where = ["attention.query", "attention.value"]
    names: list[Entry] = [f"d{k}" for k in range(ROWS)]
    few, full = loaded(size, ROWS, where), loaded(size, many, where)
    competitors = {"few": within(few, names, cached(few, ROWS)), "many": within(full, names, cached(full, ROWS))}
    seconds = interleave(competitors, rounds)
    return {"S6": round(ratio(seconds["many"], seconds["few"]), 3), "loaded": many}


def _open(model: nn.Module, names: list[Entry]) -> None:
    with dt.route(model, names):
        pass


def lane_bytes(model: nn.Module) -> int:
    """Bytes of one delta."""
    return sum(parameter.numel() * parameter.element_size() for parameter in dt.deltas(model)[0].parameters())


def bandwidth() -> float:
    """Bytes a second that memory gives, read once."""
    block = torch.ones(2**26)
    best = min(timed(block.sum) for _ in range(5))
    return block.numel() * 4 / best


@torch.no_grad()
def check(model: nn.Module) -> float:
    """Largest difference of a routed row from the row alone."""
    ids = torch.ones(4, 5, dtype=torch.long)
    names: list[Entry] = ["d0", "d1", "d2", None]
    with dt.route(model, names):
        found: Tensor = model(input_ids=ids).logits
    alone = []
    for k in range(3):
        dt.switch(model, f"d{k}")
        alone.append(model(input_ids=ids[:1]).logits)
    dt.switch(model, None)
    return float((found[:3] - torch.cat(alone)).abs().max())


def measure(name: str, rounds: int, many: int) -> dict[str, Any]:
    torch.manual_seed(0)
    size = SIZES[name]
    bare, model, other = backbone(size), loaded(size, size.loaded, ROLES), theirs(size)
    found = {"difference from rows alone": check(model)} | decode(size, rounds, bare, model, other)
    found |= prefill(size, rounds, bare, model, other)
    del bare, model, other
    if name != "M":
        found |= crowded(size, rounds, many)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", help="S, M; both if left out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--many", type=int, default=2000)
    parser.add_argument("--smoke", action="store_true", help="a tiny backbone, once")
    options = parser.parse_args()
    sizes, rounds, many = (["tiny"], 1, 40) if options.smoke else (options.sizes or ["S", "M"], options.rounds, options.many)
    compile_library()
    results = {name: measure(name, rounds, many) for name in sizes}
    report("routed batches beside PEFT and the plain backbone, medians of paired ratios", **results, bars=BARS, prefill_bars=PREFILL_BARS)
