"""What does a training step keep for its backward?

Bytes of the distinct tensors that autograd saves in one forward, parameters and buffers left out, as a ratio to the floor's (one bias at
the bottom trains). Beside ours stand PEFT and full fine-tuning: MiniLM (16 x 128), SmolLM2-135M (4 x 128) and an OPT of width 512 with 8
layers and random weights (4 x 128), fp32. Counting draws on no clock, so it may run beside other work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from paired import report
from step import BACKBONES, TOKENS, floor, full, lora, ours, quiet, theirs
from torch import Tensor, nn

DROPOUTS = {"minilm": (0.0, 0.1), "smollm2-135m": (0.0,), "opt": (0.0,)}
"""Probabilities of the backbone's dropout that are looked at."""


def saved_bytes(backbone: nn.Module, call: Callable[[], Any]) -> int:
    """Of the storages that one call saves for its backward, without the backbone's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    sizes: dict[int, int] = {}
    held: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(storage)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call()
    del output
    return sum(sizes.values())


def measure(name: str, dropout: float) -> dict[str, Any]:
    """Bytes of each competitor, and their ratios."""
    makes: dict[str, Callable[[nn.Module], Any]] = {
        "floor": floor,
        "ours": ours,
        "peft": lambda backbone: theirs(backbone, lora(name)),
        "full": full,
    }
    build, rows = BACKBONES[name]
    found: dict[str, int] = {}
    for who, make in makes.items():
        torch.manual_seed(0)
        backbone = quiet(build())
        for module in backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        make(backbone)
        ids = torch.randint(5, 5000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
        labels = ids if "CausalLM" in type(backbone).__name__ else torch.arange(rows) % 2
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found[who] = saved_bytes(backbone, partial(backbone, **batch))
    ratios = {f"{who} / floor": round(found[who] / found["floor"], 3) for who in ("ours", "peft", "full")}
    return {**ratios, "megabytes": {who: round(size / 1e6, 1) for who, size in found.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="backbones; all if left out")
    asked = parser.parse_args()
    found = {f"{name}, dropout {dropout:g}": measure(name, dropout) for name in asked.names or BACKBONES for dropout in DROPOUTS[name]}
    report("bytes saved for the backward, LoRA of rank 8 on all linear maps", **found)
