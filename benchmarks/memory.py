"""What does a training step keep for its backward?

Bytes of the distinct tensors that autograd keeps from one forward, parameters and buffers left out, as a ratio to the floor's (one bias at
the bottom trains). Beside ours, as it is and with ``dt.recompute``, stand PEFT and full fine-tuning: MiniLM (16 x 128), SmolLM2-135M
(4 x 128), and with random weights an OPT of width 512 with 8 layers, a GPT-2 and a gated T5 of the same width with 4 (4 x 128), fp32.
Counting draws on no clock, so it may run beside other work. Whether losses and gradients stay equal is asked in the same run.
``--seconds`` takes the processor time of a step in turns: ours as it is and with ``dt.recompute``, beside the floor, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from paired import interleave, ratio, report
from step import BACKBONES, TOKENS, Made, floor, full, lora, ours, quiet, theirs
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import deltatune as dt
from deltatune.training.freed import keeping_freed


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_positions=256, n_embd=512, n_layer=4, n_head=8))


def t5() -> nn.Module:
    shape = dict(d_model=512, d_ff=1024, d_kv=64, num_heads=8, num_layers=2, num_decoder_layers=2, feed_forward_proj="gated-gelu")
    return T5ForConditionalGeneration(T5Config(vocab_size=8000, decoder_start_token_id=0, **shape))


SHAPES: dict[str, tuple[Callable[[], nn.Module], int]] = {**BACKBONES, "gpt2": (gpt2, 4), "t5": (t5, 4)}
DROPOUTS = {"minilm": (0.0, 0.1), "smollm2-135m": (0.0,), "opt": (0.0, 0.1), "gpt2": (0.0, 0.1), "t5": (0.0, 0.1)}
"""Probabilities of the backbone's dropout that are looked at."""


def kept_bytes(backbone: nn.Module, loss: Tensor) -> int:
    """Of the storages that the functions below ``loss`` keep, without the backbone's own; what is kept as a formula takes none."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    sizes: dict[int, int] = {}
    seen: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for storage in _storages(node):
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _storages(node: Any) -> Iterator[Any]:
    """Of what a function keeps; behind our hooks lie tensors that are kept, and formulas, which have none."""
    fields = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
    for saved in (one for field in fields for one in (field if isinstance(field, list | tuple) else [field])):
        tensor = getattr(saved.data, "tensor", saved.data)
        if isinstance(tensor, Tensor):
            yield tensor.untyped_storage()


def made(name: str, dropout: float, make: Callable[[nn.Module], Any]) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A backbone for one competitor, and its loss."""
    build, rows = SHAPES[name]
    torch.manual_seed(0)
    backbone = quiet(build())
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = dropout  # type: ignore[assignment]
    make(backbone)
    ids = torch.randint(5, 5000, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % 2 if "Classification" in type(backbone).__name__ else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(1)
        return backbone, backbone(**batch).loss

    return loss


def anew(backbone: nn.Module) -> Made:
    found = ours(backbone)
    dt.recompute(backbone)
    return found


def gradients(backbone: nn.Module, loss: Tensor) -> list[Tensor]:
    loss.backward()
    return [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]


def measure(name: str, dropout: float) -> dict[str, Any]:
    """Bytes of each competitor, and their ratios."""
    makes: dict[str, Callable[[nn.Module], Any]] = {"floor": floor, "ours": ours, "recompute": anew, "full": full}
    if name in BACKBONES:
        makes["peft"] = lambda backbone: theirs(backbone, lora(name))
    found: dict[str, int] = {}
    results: dict[str, list[Tensor]] = {}
    for who, make in makes.items():
        backbone, loss = made(name, dropout, make)()
        found[who] = kept_bytes(backbone, loss)
        if make in (ours, anew):
            results[who] = [loss.detach(), *gradients(backbone, loss)]
    same = all(torch.equal(a, b) for a, b in zip(results["ours"], results["recompute"], strict=True))
    ratios = {f"{who} / floor": round(size / found["floor"], 3) for who, size in found.items() if who != "floor"}
    return {**ratios, "same bits": same, "megabytes": {who: round(size / 1e6, 1) for who, size in found.items()}}


def seconds(name: str, dropout: float, rounds: int) -> dict[str, Any]:
    """Processor seconds of a forward and backward, one thread, in turns."""
    torch.set_num_threads(1)
    competitors = {who: made(name, dropout, make) for who, make in {"floor": floor, "ours": ours, "recompute": anew}.items()}

    def timed(loss: Callable[[], tuple[nn.Module, Tensor]]) -> Callable[[], float]:
        def run() -> float:
            start = time.process_time()
            backbone, value = loss()
            value.backward()
            spent = time.process_time() - start
            backbone.zero_grad()
            return spent

        run()
        return run

    with keeping_freed():
        taken = interleave({who: timed(loss) for who, loss in competitors.items()}, rounds)
    pairs = (("recompute", "ours"), ("ours", "floor"), ("recompute", "floor"))
    found = {f"{one} / {other}": round(ratio(taken[one], taken[other]), 3) for one, other in pairs}
    return {**found, "processor seconds": {who: round(min(times), 3) for who, times in taken.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="backbones; all if left out")
    parser.add_argument("--seconds", type=int, default=0, metavar="ROUNDS", help="processor time instead of bytes")
    asked = parser.parse_args()
    cells = [(name, dropout) for name in asked.names or SHAPES for dropout in DROPOUTS[name]]
    if asked.seconds:
        found = {f"{name}, dropout {dropout:g}": seconds(name, dropout, asked.seconds) for name, dropout in cells}
        report("processor seconds of a forward and backward, LoRA of rank 8 on all linear maps", **found)
    else:
        found = {f"{name}, dropout {dropout:g}": measure(name, dropout) for name, dropout in cells}
        report("bytes kept for the backward, LoRA of rank 8 on all linear maps", **found)
