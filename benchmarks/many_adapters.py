"""S8: a batch of eight kinds of deltas, four rows each, beside AdapterHub's ``BatchSplit`` on the kinds it has.

``BatchSplit`` does not mix kinds, so AdapterHub serves such a batch kind by kind: a pass with four rows for each kind it has. Ours is
one pass, of the same kinds. Beside that stand eight adapters of one kind, which ``BatchSplit`` is made for. A decode step on a Llama of
width 512 with 8 layers and random weights (as S1 of ``many.py``). AdapterHub pins an older transformers: it runs in a process of its own,
in turns with ours, and each library's time counts relative to its own plain backbone.

``--theirs`` names the Python of an environment with ``pip install adapters==1.3.0 torch==2.13.0``.

Bar: (the sum of its passes / its plain backbone with as many rows) / (our one pass / our plain backbone) >= 2.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from many import SIZES, backbone, cached, plain, within
from paired import interleave, ratio, report
from torch import nn

import deltatune as dt
from deltatune.methods import IA3, Adapter, BitFit, Compacter, LoRA, ParallelAdapter, PfeifferAdapter, PrefixTuning
from deltatune.methods.kinds import Method
from deltatune.multi.routing import Entry

WORKER = Path(__file__).with_name("adapters_worker.py")
EACH = 4
WHERE = ["attention.query", "attention.key", "attention.value", "feed_forward.*"]
"""Of LoRA, as its peer has it."""

METHODS: dict[str, tuple[Method, list[str] | None]] = {
    "lora": (LoRA(rank=8), WHERE),
    "ia3": (IA3(), None),
    "houlsby": (Adapter(), None),
    "pfeiffer": (PfeifferAdapter(), None),
    "parallel": (ParallelAdapter(), None),
    "compacter": (Compacter(), None),
    "prefix": (PrefixTuning(10), None),
    "bitfit": (BitFit(), None),
}


class Theirs:
    """AdapterHub's process."""

    def __init__(self, python: str, size: str) -> None:
        shape = [str(number) for number in (SIZES[size].width, SIZES[size].feed_forward, SIZES[size].layers)]
        command = [python, str(WORKER), str(torch.get_num_threads()), *shape]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ask(self, name: str) -> str:
        """Seconds of one step, or why it cannot."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"The process of {self.process.args!r} ended. Does its Python have `adapters`?")
        return answer


def routed(size: str, kinds: list[str]) -> tuple[nn.Module, list[Entry]]:
    """A backbone with a delta a kind given, and the entries of a batch with four rows each."""
    model = backbone(SIZES[size])
    names = [f"{kind}{k}" for k, kind in enumerate(kinds)]
    for name, kind in zip(names, kinds, strict=True):
        method, where = METHODS[kind]
        delta = dt.attach(model, method, where, name=name)
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        delta.disable()
    return model, [name for name in names for _ in range(EACH)]


@torch.no_grad()
def measure(python: str, size: str, rounds: int) -> dict[str, Any]:
    theirs = Theirs(python, size)
    answers = {kind: theirs.ask(f"split {kind}") for kind in METHODS if kind != "bitfit"}
    able = [kind for kind, answer in answers.items() if not answer.startswith("cannot")]
    few, many = len(able) * EACH, len(METHODS) * EACH
    competitors: dict[str, Callable[[], float]] = {str(rows): plain(cached(backbone(SIZES[size]), rows)) for rows in (few, many)}
    for name, kinds in {"same kinds": able, "eight kinds": list(METHODS), **{kind: [kind] * 8 for kind in able}}.items():
        model, entries = routed(size, kinds)
        competitors[name] = within(model, entries, cached(model, len(entries)))
    asked = [f"plain {few}", f"plain {many}", *(f"{how} {kind}" for kind in able for how in ("split", "alone"))]
    competitors |= {f"theirs {what}": lambda what=what: float(theirs.ask(what)) for what in asked}  # type: ignore[misc]
    seconds = interleave(competitors, rounds)
    passes = [sum(times) for times in zip(*(seconds[f"theirs alone {kind}"] for kind in able), strict=True)]
    kind_by_kind = [a / b for a, b in zip(passes, seconds[f"theirs plain {few}"], strict=True)]
    at_once = [a / b for a, b in zip(seconds["same kinds"], seconds[str(few)], strict=True)]

    def relative(kind: str) -> tuple[float, float]:
        return ratio(seconds[f"theirs split {kind}"], seconds[f"theirs plain {many}"]), ratio(seconds[kind], seconds[str(many)])

    return {
        "S8": round(ratio(kind_by_kind, at_once), 2),
        "kinds": able,
        "relative to the plain backbone": {
            "theirs, kind by kind": round(statistics.median(kind_by_kind), 2),
            "ours, the same kinds": round(statistics.median(at_once), 2),
            "ours, eight kinds": round(ratio(seconds["eight kinds"], seconds[str(many)]), 2),
        },
        "eight deltas of one kind, theirs and ours": {kind: [round(number, 2) for number in relative(kind)] for kind in able},
        "cannot": {kind: answer for kind, answer in answers.items() if kind not in able},
        "milliseconds": {name: round(1e3 * statistics.median(times), 1) for name, times in seconds.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", help="the Python of an environment with adapters; without it nothing is measured")
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    if asked.theirs is None:
        raise SystemExit(print("nothing measured: --theirs names the Python of an environment with adapters==1.3.0", file=sys.stderr))
    report(
        "eight kinds of deltas in one batch beside AdapterHub's BatchSplit, relative to each one's plain backbone",
        **measure(asked.theirs, asked.size, asked.rounds),
    )
