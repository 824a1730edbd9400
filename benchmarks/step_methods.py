"""What does a training step of the other methods cost beside its floor, and beside PEFT?

As in ``step.py``: MiniLM (16 x 128), SmolLM2-135M (4 x 128) and an OPT of width 512 with 8 layers (4 x 128), fp32, nothing dropped. The
floor is the frozen backbone's forward plus the backward of its activations, one bias at the bottom trained; of prompts at their longer
length. Each method takes turns with its floor and with PEFT where that has it; BitFit and adapters it has not. Medians of paired ratios.

Bars: ours / floor at most 1.10, DoRA 1.25, and ours below PEFT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from paired import interleave, ratio, report
from step import BACKBONES, LINEARS, RANK, TARGETS, TOKENS, floor, ours, stepper, theirs

from deltatune.compiled.library import compile_library
from deltatune.methods import IA3, Adapter, BitFit, DoRA, PrefixTuning, PromptTuning, VeRA
from deltatune.methods.kinds import Method
from deltatune.training.flat import FlatAdamW
from deltatune.training.freed import keeping_freed

VIRTUAL, VERA_RANK = 20, 256
KEYS_VALUES = {
    "minilm": (r".*(key|value|intermediate\.dense)", r".*intermediate\.dense"),
    "smollm2-135m": (r".*(k_proj|v_proj|down_proj)", r".*down_proj"),
    "opt": (r".*(k_proj|v_proj|fc2)", r".*fc2"),
}
"""What PEFT's (IA)^3 scales, and which of it is scaled ahead of the map."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: ours.
        where: its sites; None for its own.
        peer: PEFT's configuration of the same for a backbone; None where PEFT has none.
        bar: of ours / floor.
        longer: tokens that it puts ahead of each text.
    """

    method: Method
    where: Sequence[str] | None = None
    peer: Callable[[str], peft.PeftConfig] | None = None
    bar: float = 1.10
    longer: int = 0


def task_type(name: str) -> str:
    return "SEQ_CLS" if name == "minilm" else "CAUSAL_LM"


def ia3(name: str) -> peft.PeftConfig:
    targets, ahead = KEYS_VALUES[name]
    return peft.IA3Config(target_modules=targets, feedforward_modules=ahead)


ROWS = {
    "bitfit": Row(BitFit()),
    "ia3": Row(IA3(), peer=ia3),
    "adapter": Row(Adapter()),
    "prefix-tuning": Row(
        PrefixTuning(VIRTUAL, reparameterization=False),
        peer=lambda name: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type=task_type(name)),
    ),
    "prompt-tuning": Row(
        PromptTuning(VIRTUAL, init="random"),
        peer=lambda name: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, task_type=task_type(name)),
        longer=VIRTUAL,
    ),
    "dora": Row(
        DoRA(rank=RANK),
        LINEARS,
        lambda name: peft.LoraConfig(r=RANK, lora_alpha=16, use_dora=True, target_modules=TARGETS[name]),
        bar=1.25,
    ),
    "vera": Row(VeRA(rank=VERA_RANK), LINEARS, lambda name: peft.VeraConfig(r=VERA_RANK, target_modules=TARGETS[name])),
}


def measure(name: str, row: Row, rounds: int) -> dict[str, Any]:
    """One method on one backbone."""
    torch.manual_seed(0)
    competitors = {
        "floor": stepper(name, floor, TOKENS + row.longer),
        "ours": stepper(name, lambda backbone: ours(backbone, row.method, row.where), optimizer_of=FlatAdamW),
    }
    found: dict[str, Any] = {}
    if row.peer is not None:
        config = row.peer(name)
        try:
            competitors["peft"] = stepper(name, lambda backbone: theirs(backbone, config))
        except Exception as error:  # what a peer cannot do is a finding
            found["peft cannot"] = f"{type(error).__name__}: {str(error)[:120]}"
    seconds = interleave(competitors, rounds)
    found["ours / floor"] = round(ratio(seconds["ours"], seconds["floor"]), 3)
    found["bar"] = row.bar
    if "peft" in seconds:
        found["peft / floor"] = round(ratio(seconds["peft"], seconds["floor"]), 3)
        found["ours / peft"] = round(ratio(seconds["ours"], seconds["peft"]), 3)
    found["milliseconds"] = {who: round(1e3 * sorted(times)[len(times) // 2], 1) for who, times in seconds.items()}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; all if left out")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    compile_library()
    rows: dict[str, dict[str, Any]] = {}
    with keeping_freed():
        for name in asked.names or ROWS:
            for backbone in asked.backbones:
                print(f"{name} on {backbone}", file=sys.stderr)
                rows.setdefault(name, {})[backbone] = measure(backbone, ROWS[name], asked.rounds)
    report("a training step of each method, medians of paired ratios", bars="1.10, DoRA 1.25", **rows)
