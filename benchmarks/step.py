"""What does a training step cost beside its floor?

The floor is the frozen backbone's forward plus the backward of its activations, measured in the same run by training one bias at the
bottom. Beside ours stand PEFT and full fine-tuning: MiniLM (16 x 128), SmolLM2-135M (4 x 128) and an OPT of width 512 with 8 layers
and random weights (4 x 128), fp32. A step is forward, backward and the optimiser; competitors take turns, medians of paired ratios.
Freed memory stays with the process, as it does in ``dt.train``: for all competitors alike. ``--as-is`` leaves that to the C library.
The optimiser of ours is that of ``dt.train`` (``training/flat.py``), of the others ``torch.optim.AdamW``.
Ours runs the loops that ``deltatune operators compile`` compiles; what it takes without them stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import peft
import torch
from paired import interleave, ratio, report, timed
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import deltatune as dt
from deltatune.backbones import load_backbone
from deltatune.compiled.library import compile_library
from deltatune.injection import fused
from deltatune.methods import LoRA
from deltatune.methods.kinds import Method
from deltatune.training.flat import FlatAdamW
from deltatune.training.freed import keeping_freed

LINEARS = ["attention.*", "feed_forward.*"]
RANK, TOKENS = 8, 128


def minilm() -> nn.Module:
    return load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=2)


def smollm2() -> nn.Module:
    return load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM")


def opt() -> nn.Module:
    shape = dict(hidden_size=512, ffn_dim=2048, num_hidden_layers=8, num_attention_heads=8, word_embed_proj_dim=512, dropout=0.0)
    return OPTForCausalLM(OPTConfig(vocab_size=8000, max_position_embeddings=256, **shape))


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {"minilm": (minilm, 16), "smollm2-135m": (smollm2, 4), "opt": (opt, 4)}
TARGETS = {
    "minilm": r".*(query|key|value|attention\.output\.dense|intermediate\.dense|output\.dense)",
    "smollm2-135m": r".*(q|k|v|o|gate|up|down)_proj",
    "opt": r".*((q|k|v|out)_proj|fc1|fc2)",
}


def quiet(backbone: nn.Module) -> nn.Module:
    """In training, but without dropout, so that all compute the same."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return backbone.train()


Made = tuple[nn.Module, list[nn.Parameter]]
"""What is called in a step, and what it trains."""


def floor(backbone: nn.Module) -> Made:
    """One bias at the bottom: that of the first norm, in the embeddings or the first layer."""
    backbone.requires_grad_(False)
    for name, module in backbone.named_modules():
        if "final" in name:  # OPT makes it before its layers
            continue
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.LayerNorm) or (weight is not None and type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))):
            parameter = module.bias if getattr(module, "bias", None) is not None else weight
            return backbone, [parameter.requires_grad_()]
    raise SystemExit("no norm at the bottom")


def ours(backbone: nn.Module, method: Method | None = None, where: Sequence[str] | None = LINEARS) -> Made:
    delta = dt.attach(backbone, method or LoRA(rank=RANK), where, head=False)
    return backbone, list(delta.parameters())


def theirs(backbone: nn.Module, config: peft.PeftConfig) -> Made:
    model = peft.get_peft_model(backbone, config)  # type: ignore[arg-type]
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora(name: str) -> peft.LoraConfig:
    """The same as ours, in PEFT."""
    return peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS[name])


def full(backbone: nn.Module) -> Made:
    return backbone, list(backbone.requires_grad_().parameters())


def stepper(
    name: str, made: Callable[[nn.Module], Made], tokens: int = TOKENS, optimizer_of: type[torch.optim.AdamW] = torch.optim.AdamW
) -> Callable[[], float]:
    """Seconds of one step of batches with so many tokens a row."""
    build, rows = BACKBONES[name]
    backbone = quiet(build())
    model, parameters = made(backbone)
    optimizer = optimizer_of(parameters, lr=1e-5)
    ids = torch.randint(5, 5000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids if "CausalLM" in type(backbone).__name__ else torch.arange(rows) % 2
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()

    def warm() -> float:
        """A step behind another competitor finds caches and heap as that one left them; a training's steps follow their own."""
        step()
        return timed(step)

    return warm


def uncompiled(work: Callable[[], float]) -> Callable[[], float]:
    """The same as if nothing had been compiled."""

    def measured() -> float:
        with patch.object(fused, "is_compiled", return_value=False):
            return work()

    return measured


def measure(name: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    own = stepper(name, ours, optimizer_of=FlatAdamW)
    competitors = {
        "floor": stepper(name, floor),
        "ours": own,
        "ours, not compiled": uncompiled(own),
        "peft": stepper(name, lambda backbone: theirs(backbone, lora(name))),
        "full": stepper(name, full),
    }
    seconds = interleave(competitors, rounds)
    return {
        "ours / floor": round(ratio(seconds["ours"], seconds["floor"]), 3),
        "ours, not compiled / floor": round(ratio(seconds["ours, not compiled"], seconds["floor"]), 3),
        "peft / floor": round(ratio(seconds["peft"], seconds["floor"]), 3),
        "full / floor": round(ratio(seconds["full"], seconds["floor"]), 3),
        "ours / full": round(ratio(seconds["ours"], seconds["full"]), 3),
        "milliseconds": {who: round(1e3 * sorted(times)[len(times) // 2], 1) for who, times in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="backbones; all if left out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--as-is", action="store_true", help="freed memory goes back to the system where the C library gives it back")
    asked = parser.parse_args()
    compile_library()
    found = {}
    with nullcontext() if asked.as_is else keeping_freed():
        for name in asked.names or BACKBONES:
            print(name, file=sys.stderr)
            found[name] = measure(name, asked.rounds)
    report(f"a step of LoRA of rank {RANK} on all linear maps, medians of paired ratios", **found)
