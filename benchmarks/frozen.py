"""What does a step cost once what the frozen layers give is kept (`keep_frozen`), beside a step that computes it?

MiniLM, 16 x 128 tokens, fp32, dropout off, in processor seconds (which a busy machine changes less than the clock's); competitors take
turns, medians of paired ratios. Arithmetic allows (1 + 2q) / 3q for what trains whole layers and (1 + q) / 2q for LoRA, with q the
share of layers above the cut, and anything for a head alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from paired import interleave, ratio, report
from step import minilm, quiet

import deltatune as dt
from deltatune.backbones import load_tokenizer
from deltatune.methods import LastLayers, LinearProbe, LoRA, Method
from deltatune.tasks import Task
from deltatune.tasks.framing import HeadFraming
from deltatune.training.kept import ROW, KeptRows

ROWS, TOKENS, LAYERS = 16, 128, 6
LINEARS = ["attention.*", "feed_forward.*"]
CASES: dict[str, tuple[Method, dict[str, Any], float | None]] = {
    "head alone": (LinearProbe(), {}, None),
    "last quarter, two of six": (LastLayers(), {}, (1 + 4 / LAYERS) / (6 / LAYERS)),
    "LoRA, top 1": (LoRA(rank=8), {"where": LINEARS, "layers": "top:1"}, (1 + 1 / LAYERS) / (2 / LAYERS)),
    "LoRA, top 2": (LoRA(rank=8), {"where": LINEARS, "layers": "top:2"}, (1 + 2 / LAYERS) / (4 / LAYERS)),
    "LoRA, top 3": (LoRA(rank=8), {"where": LINEARS, "layers": "top:3"}, (1 + 3 / LAYERS) / (6 / LAYERS)),
}


def steppers(method: Method, options: dict[str, Any]) -> tuple[Callable[[], float], Callable[[], float]]:
    """Processor seconds of a step without and with what is kept."""
    torch.manual_seed(0)
    backbone = quiet(minilm())
    task = Task("random", "classification", ("text",), "label", labels=("a", "b"), metrics=("accuracy",))
    framing = HeadFraming(task, load_tokenizer("minilm"), TOKENS)
    delta = dt.attach(backbone, method, **options)
    ids = torch.randint(5, 5000, (ROWS, TOKENS)).tolist()
    features = [{"input_ids": row, "token_type_ids": [0] * TOKENS, "labels": number % 2} for number, row in enumerate(ids)]
    kept = KeptRows(backbone, framing, features, "memory")
    optimizer = torch.optim.AdamW(list(delta.parameters()), lr=1e-5)
    numbered = kept.numbered()

    def step(keeps: bool) -> float:
        began = time.process_time()
        batch = kept.collate(numbered)
        rows = batch.pop(ROW).tolist()
        if keeps:
            with kept.given(rows):
                loss = framing.loss(backbone, batch)
        else:
            loss = framing.loss(backbone, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began

    return lambda: step(False), lambda: step(True)


def measure(rounds: int = 7) -> dict[str, Any]:
    found = {}
    for name, (method, options, allowed) in CASES.items():
        plain, keeping = steppers(method, options)
        seconds = interleave({"plain": plain, "kept": keeping}, rounds)
        gain = ratio(seconds["plain"], seconds["kept"])
        milliseconds = {who: round(1e3 * sorted(times)[len(times) // 2], 1) for who, times in seconds.items()}
        found[name] = {"gain": round(gain, 2), "allowed": allowed and round(allowed, 2), "milliseconds": milliseconds}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # a second thread that waits counts as work
    report("steps with and without what frozen layers give kept, in processor seconds", **measure())
