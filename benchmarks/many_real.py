"""Routed batches on real backbones: 64 classifiers on MiniLM in one batch, 32 LoRAs decoding on SmolLM2-135M.

Classifiers: every row of 64 news texts goes to its own LoRA with its own pooler and five-label head. Beside ours stand the plain
backbone, PEFT's mixed batch (LoRA, pooler and head per row as well), and both libraries switching from row to row. Decoding: as S1 of
``many.py``, 32 rows behind 64 cached tokens, LoRA of rank 8 on all seven linear maps.

Deltas are random, which changes no time. Floor: the plain backbone's batch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from many import ROWS, TARGETS, cached, plain, within
from paired import interleave, ratio, report, timed
from torch import nn

import deltatune as dt
from deltatune.backbones import load_backbone, load_tokenizer
from deltatune.methods import LoRA
from deltatune.tasks import load_task

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CLASSIFIERS, LABELS, LENGTH = 64, 5, 64
ROLES = ["attention.*", "feed_forward.*"]


def classifier() -> nn.Module:
    """MiniLM with a head for five labels."""
    torch.manual_seed(0)
    return load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=LABELS)


def shaken(delta: dt.Delta) -> None:
    """As if it were trained."""
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def attached(backbone: nn.Module, number: int, where: list[str] | None = None) -> nn.Module:
    """The backbone with so many LoRAs at rest, in its bank."""
    for k in range(number):
        delta = dt.attach(backbone, LoRA(rank=8), where, name=f"d{k}")
        shaken(delta)
        delta.disable()
    for k in range(number):
        dt.bank(backbone).add(f"d{k}")
    return backbone


def theirs(backbone: nn.Module, number: int, **options: Any) -> Any:
    """PEFT's model with as many."""
    import peft

    config = peft.LoraConfig(r=8, init_lora_weights=False, **options)
    model = peft.get_peft_model(backbone, config, adapter_name="d0")  # type: ignore[arg-type]
    for k in range(1, number):
        model.add_adapter(f"d{k}", config)
    return model.eval()


def texts(rows: int) -> dict[str, torch.Tensor]:
    """News, one text a row."""
    found = [row["text"] for row in load_task("bbc-news").test[:rows]]
    made = load_tokenizer("minilm")(found, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def one_by_one(rows: int, batch: dict[str, torch.Tensor], switch: Callable[[str], None], model: nn.Module) -> Callable[[], float]:
    """Seconds of switching to the delta of each row and computing it alone."""
    alone = [{name: tensor[k : k + 1] for name, tensor in batch.items()} for k in range(rows)]

    def work() -> None:
        for k in range(rows):
            switch(f"d{k}")
            model(**alone[k])

    return lambda: timed(work)


@torch.no_grad()
def classify(rounds: int, number: int) -> dict[str, Any]:
    """64 classifiers in one batch."""
    base, ours = classifier(), attached(classifier(), number)
    target = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    other = theirs(classifier(), number, target_modules=target, task_type="SEQ_CLS", modules_to_save=["classifier", "pooler.dense"])
    batch, names = texts(number), [f"d{k}" for k in range(number)]
    seconds = interleave(
        {
            "backbone": plain(lambda: base(**batch)),
            "ours": within(ours, list(names), lambda: ours(**batch)),
            "ours in turn": one_by_one(number, batch, lambda name: dt.switch(ours, name), ours),
            "peft": plain(lambda: other(**batch, adapter_names=names)),
            "peft in turn": one_by_one(number, batch, other.set_adapter, other),
        },
        rounds,
    )
    with dt.route(ours, list(names)):
        routed = ours(**batch).logits
    difference = 0.0
    for k in range(0, number, 7):
        dt.switch(ours, f"d{k}")
        difference = max(
            difference, float((ours(**{name: tensor[k : k + 1] for name, tensor in batch.items()}).logits - routed[k]).abs().max())
        )
    return {"difference from rows alone": difference, **_ratios(seconds)}


@torch.no_grad()
def decode(rounds: int, number: int) -> dict[str, Any]:
    """32 LoRAs, a token each."""
    ours = attached(load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM"), number, ROLES)
    other = theirs(load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM"), number, target_modules=list(TARGETS))
    step, mixed, alone = cached(ours, number), cached(other.base_model.model, number), cached(other.base_model.model, 1)
    names = [f"d{k}" for k in range(number)]

    def peft_step() -> None:
        with other._enable_peft_forward_hooks(adapter_names=names):
            mixed()

    def in_turn() -> None:
        for name in names:
            other.set_adapter(name)
            alone()

    competitors = {
        "backbone": plain(step),
        "ours": within(ours, list(names), step),
        "peft": plain(peft_step),
        "peft in turn": lambda: timed(in_turn),
    }
    return _ratios(interleave(competitors, rounds))


def _ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "ours / backbone": round(ratio(seconds["ours"], seconds["backbone"]), 3),
        **{
            f"{name} / ours": round(ratio(times, seconds["ours"]), 2) for name, times in seconds.items() if name not in ("ours", "backbone")
        },
        "milliseconds": {name: round(1e3 * sorted(times)[len(times) // 2], 1) for name, times in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="four deltas, once")
    asked = parser.parse_args()
    rounds, classifiers, rows = (1, 4, 4) if asked.smoke else (asked.rounds, CLASSIFIERS, ROWS)
    report(
        "routed batches on real backbones, medians of paired ratios",
        classifiers=classify(rounds, classifiers),
        decoding=decode(rounds, rows),
        numbers={"classifiers": classifiers, "decoding": rows},
    )
