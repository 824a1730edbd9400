"""Does the thousandth delta cost what the first did? Attach and switch with 1,000 small LoRAs; bar: 1.5 times the first.

PEFT's ``add_adapter`` and ``set_adapter`` are measured in between, with fewer adapters because their time grows. The very
first attach also walks the backbone once; it is given beside the first twenty that follow, which are the base of the ratio.
"""

from __future__ import annotations

import statistics

import peft
import torch
from paired import report, timed
from torch import nn
from transformers import BertConfig, BertModel

import deltatune as dt
from deltatune.methods import LoRA

DELTAS, PEFT_ADAPTERS, WINDOW = 1000, 60, 20


def backbone() -> nn.Module:
    return BertModel(BertConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4))


def measured() -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of ours and of PEFT's, taken in turns."""
    model, fresh = backbone(), backbone()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    theirs = peft.get_peft_model(backbone(), config)
    very_first = timed(lambda: dt.attach(model, LoRA(rank=2), name="first"))
    for k in range(2):
        dt.attach(fresh, LoRA(rank=2), name=f"d{k}")
    times: dict[str, list[float]] = {name: [] for name in ("attach", "switch", "few", "add", "set")}
    for k in range(DELTAS):
        times["attach"].append(timed(lambda k=k: dt.attach(model, LoRA(rank=2), name=f"d{k}")))  # type: ignore[misc]
        dt.switch(model, f"d{k}")
        if k % (DELTAS // PEFT_ADAPTERS) == 0 and len(times["add"]) < PEFT_ADAPTERS:
            times["add"].append(timed(lambda k=k: theirs.add_adapter(f"d{k}", config)))  # type: ignore[misc]
            times["set"].append(timed(lambda k=k: theirs.set_adapter(f"d{k}")))  # type: ignore[misc]
    for k in range(DELTAS):
        times["switch"].append(timed(lambda k=k: dt.switch(model, f"d{k}")))  # type: ignore[misc]
        times["few"].append(timed(lambda k=k: dt.switch(fresh, f"d{k % 2}")))  # type: ignore[misc]
    ours = {
        "attach_very_first_ms": 1e3 * very_first,
        "attach_first_ms": 1e3 * statistics.median(times["attach"][:WINDOW]),
        "attach_last_ms": 1e3 * statistics.median(times["attach"][-WINDOW:]),
        "switch_with_2_ms": 1e3 * statistics.median(times["few"]),
        "switch_with_1000_ms": 1e3 * statistics.median(times["switch"]),
    }
    return ours, {
        "attach_first_ms": 1e3 * statistics.median(times["add"][:5]),
        f"attach_last_of_{PEFT_ADAPTERS}_ms": 1e3 * statistics.median(times["add"][-5:]),
        "switch_first_ms": 1e3 * statistics.median(times["set"][:5]),
        f"switch_last_of_{PEFT_ADAPTERS}_ms": 1e3 * statistics.median(times["set"][-5:]),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    mine, other = measured()
    attach = mine["attach_last_ms"] / mine["attach_first_ms"]
    switch = mine["switch_with_1000_ms"] / mine["switch_with_2_ms"]
    report(
        f"the {DELTAS}th delta / the first, in one run",
        attach_ratio=round(attach, 2),
        switch_ratio=round(switch, 2),
        deltatune={key: round(value, 3) for key, value in mine.items()},
        peft={key: round(value, 3) for key, value in other.items()},
        bar=1.5,
        holds=attach <= 1.5 and switch <= 1.5,
    )
