"""Does the thousandth delta cost what the first did? Attach and switch with 1,000 small LoRAs; bar: 1.5 times the first.

PEFT is measured beside it, with fewer adapters because its time grows: ``add_adapter`` and ``set_adapter``.
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


def ours() -> dict[str, float]:
    model = backbone()
    dt.attach(model, LoRA(rank=2), name="warm")  # indexes the backbone once
    attach = []
    for k in range(DELTAS):
        attach.append(timed(lambda k=k: dt.attach(model, LoRA(rank=2), name=f"d{k}")))  # type: ignore[misc]
        if k:
            dt.switch(model, f"d{k}")
    switch = [timed(lambda k=k: dt.switch(model, f"d{k % DELTAS}")) for k in range(DELTAS)]  # type: ignore[misc]
    fresh = backbone()
    for k in range(2):
        dt.attach(fresh, LoRA(rank=2), name=f"d{k}")
    few = [timed(lambda k=k: dt.switch(fresh, f"d{k % 2}")) for k in range(DELTAS)]  # type: ignore[misc]
    return {
        "attach_first_ms": 1e3 * statistics.median(attach[:WINDOW]),
        "attach_last_ms": 1e3 * statistics.median(attach[-WINDOW:]),
        "switch_with_2_ms": 1e3 * statistics.median(few),
        "switch_with_1000_ms": 1e3 * statistics.median(switch),
    }


def theirs() -> dict[str, float]:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(backbone(), config)
    attach, switch = [], []
    for k in range(PEFT_ADAPTERS):
        attach.append(timed(lambda k=k: model.add_adapter(f"d{k}", config)))  # type: ignore[misc]
        switch.append(timed(lambda k=k: model.set_adapter(f"d{k}")))  # type: ignore[misc]
    return {
        "attach_first_ms": 1e3 * statistics.median(attach[:5]),
        f"attach_last_of_{PEFT_ADAPTERS}_ms": 1e3 * statistics.median(attach[-5:]),
        "switch_first_ms": 1e3 * statistics.median(switch[:5]),
        f"switch_last_of_{PEFT_ADAPTERS}_ms": 1e3 * statistics.median(switch[-5:]),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    mine, other = ours(), theirs()
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
