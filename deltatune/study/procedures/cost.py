"""``cost``: what a step costs, in time and memory, each measured in a process of its own; nothing is learnt, and there is no score."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from deltatune.study.procedures.apart import apart
from deltatune.study.procedures.procedure import procedures
from deltatune.study.procedures.step import memory, times
from deltatune.study.trial import Outcome, Trial
from deltatune.training.files import write_text

ROUNDS = 7
MEMORY = "memory.json"


@procedures.register("cost")
def cost(trial: Trial, folder: Path) -> Outcome:
    """Peak memory, then times in turns with full fine-tuning.

    The batch is ``batch_size`` rows of ``max_length`` random tokens. Options: ``rounds`` of the timing, 7 if left out; ``most_seconds``
    that three steps may take, no limit if left out; ``plain`` trains the backbone's own parameters without a delta.

    ``numbers`` has ``live_bytes`` (of tensors, at their peak), ``peak_memory_bytes`` (of the process, beyond its libraries) and ``rounds``:
    of each round the seconds of ``forward``, ``backward``, ``optimiser`` and ``inference``, ours and full fine-tuning's. Where the rounds
    would take longer than ``most_seconds``, there are none.

    Raises:
        Unsupported: it takes more memory, or more time, than there is here.
    """
    began, kept = time.perf_counter(), folder / MEMORY
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else apart(memory, trial)
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(found))
    rounds, most = int(trial.options.get("rounds", ROUNDS)), trial.options.get("most_seconds")
    timed = most is None or 2 * rounds * found["expected_seconds"] <= float(most)
    numbers = {**found, "rounds": apart(times, trial, rounds) if timed else []}
    return Outcome(trial.key, numbers, seconds=round(time.perf_counter() - began, 3))
