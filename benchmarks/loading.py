"""Examples a second: reading a task's rows, rendering and tokenizing them, and reading them from the cache the second time.

Needs a mirror (DELTATUNE_MIRROR). Run: python benchmarks/loading.py [--tasks glue-sst2,...] > loading.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from deltatune.backbones import load_tokenizer
from deltatune.tasks import load_task
from deltatune.tasks.framing import Framing, HeadFraming
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training import tokens

TASKS = "glue-sst2,trec-coarse,rotten-tomatoes,stsb,snli,commonsense-qa,atis-slots,ag-news"
LENGTH = 128


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """The best of some wall times, and what came of the work."""
    times, found = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - began)
    return min(times), found


def measured(name: str, framing_of: Callable[[Any, Any], Framing], tokenizer: Any) -> dict[str, Any]:
    loading, data = timed(lambda: load_task(name))
    rows = sum(map(len, data.splits.values()))
    framing = framing_of(data.task, tokenizer)
    making, _ = timed(lambda: framing.encode(data.train))
    tokens.encoded(framing, data)
    again, _ = timed(lambda: tokens.encoded(framing, data))
    count = len(data.train)
    return {
        "task": name,
        "framing": framing.name,
        "rows": count,
        "load_per_second": round(rows / loading),
        "encode_per_second": round(count / making),
        "whole_per_second": round(count / (loading * count / rows + making)),
        "from_cache_per_second": round(count / again),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=TASKS)
    arguments = parser.parse_args()
    minilm, smollm = load_tokenizer("minilm"), load_tokenizer("smollm2-135m")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DELTATUNE_CACHE"] = folder
        tokens.FEWEST = 1
        for name in arguments.tasks.split(","):
            found.append(measured(name, lambda task, tokenizer: HeadFraming(task, tokenizer, LENGTH), minilm))
            found.append(measured(name, lambda task, tokenizer: TextToTextFraming(task, tokenizer, LENGTH), smollm))
    print(json.dumps({"cores": os.cpu_count(), "max_length": LENGTH, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
