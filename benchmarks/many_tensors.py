"""What does the optimiser take of a step in which ten thousand small tensors train?

LoRA of rank 2 on the 5,040 linear maps of a Llama of width 64 with 720 layers and random weights, two texts of 32 tokens. The same
gradients are stepped with, in turns, by ``torch.optim.AdamW`` a tensor a time, by its ``foreach`` and ``fused`` forms, and by the vector
that ``dt.train`` takes (``training/flat.py``). Processor seconds, medians of paired ratios.

Floor: AdamW's one pass over as many numbers in one tensor. Bar: at most 3% of a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from paired import interleave, ratio, report
from torch import nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.methods import LoRA
from deltatune.training.flat import FlatAdamW

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 720, "num_attention_heads": 4, "vocab_size": 512}
ROWS, TOKENS = 2, 32


def seconds_of(work: Callable[[], Any]) -> Callable[[], float]:
    """Processor seconds of one call."""

    def measured() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return measured


def stepped(make: Callable[[list[nn.Parameter]], AdamW], parameters: list[nn.Parameter]) -> Callable[[], float]:
    """An optimiser's step over copies of the Parameters, with copies of their gradients."""
    own = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for parameter, other in zip(own, parameters, strict=True):
        assert other.grad is not None
        parameter.grad = other.grad.clone()
    optimizer = make(own)
    optimizer.step()
    return seconds_of(optimizer.step)


def measure(rounds: int) -> dict[str, Any]:
    """Every form, beside forward and backward."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    parameters = list(dt.attach(backbone, LoRA(rank=2), ["attention.*", "feed_forward.*"]).parameters())
    ids = torch.randint(5, 500, (ROWS, TOKENS))

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        backbone(input_ids=ids, labels=ids).loss.backward()

    both()
    numbers = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    numbers.grad = torch.zeros_like(numbers)
    forms: dict[str, Callable[[list[nn.Parameter]], AdamW]] = {
        "a tensor a time": lambda own: AdamW(own, foreach=False),
        "foreach": lambda own: AdamW(own, foreach=True),
        "fused": lambda own: AdamW(own, fused=True),
        "one vector": FlatAdamW,
    }
    competitors = {"forward and backward": seconds_of(both), "floor": stepped(lambda own: AdamW(own, fused=True), [numbers])}
    seconds = interleave(competitors | {name: stepped(make, parameters) for name, make in forms.items()}, rounds)
    whole = [ahead + own for ahead, own in zip(seconds["forward and backward"], seconds["one vector"], strict=True)]
    return {
        "tensors": len(parameters),
        "numbers": sum(parameter.numel() for parameter in parameters),
        "one vector / step": round(ratio(seconds["one vector"], whole), 4),
        "bar": 0.03,
        "one vector / floor": round(ratio(seconds["one vector"], seconds["floor"]), 1),
        **{f"{name} / one vector": round(ratio(seconds[name], seconds["one vector"]), 1) for name in forms if name != "one vector"},
        "milliseconds": {who: round(1e3 * sorted(times)[len(times) // 2], 2) for who, times in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    report("the optimiser's share of a step of 10,000 small tensors", **measure(parser.parse_args().rounds))
