"""Examples a second: reading a task's rows, rendering and tokenizing them, and reading them from the cache the second time.

The bar is 10,000 examples a second on two cores for short texts. The floor is the tokenizer alone, called in the same batches with the same
texts. Seconds are those of the processor (user and system, all threads), so that a busy machine does not enter; of two free cores only the
tokenizer's own code uses both, and `two_cores_per_second` follows from that: the whole less half of the tokenizer's own share.

With ``--wall``, seconds are those of the clock: on a machine with nothing beside it, `whole` is the first use from the mirror's file to
token ids, and `again` the second, which reads the rows, computes their fingerprint, and takes the token ids from the cache.

Needs a mirror (DELTATUNE_MIRROR). Run: python benchmarks/loading.py [--tasks glue-sst2,...] > results/loading.json
and, with nothing beside it, python benchmarks/loading.py --wall > results/loading_wall.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from deltatune.backbones import load_tokenizer
from deltatune.tasks import Task, load_task
from deltatune.tasks.framing import Framing, HeadFraming
from deltatune.tasks.tensors import SEVERAL
from deltatune.tasks.text2text import TextToTextFraming
from deltatune.training import tokens

TASKS = "glue-sst2,trec-coarse,rotten-tomatoes,emotion,snli,ag-news"
LENGTH, REPEATS, WALL_REPEATS, BAR = 128, 3, 5, 10_000


class Listening:
    """A tokenizer that remembers what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """As the tokenizer answers."""
        self.calls.append((texts, options))
        return self.tokenizer(*texts, **options)


def seconds(*works: Callable[[], Any]) -> list[float]:
    """The least processor time of each of some works, taken in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [min(taken) for taken in times]


def waited(work: Callable[[], Any]) -> float:
    """The median time of a work by the clock."""
    taken = []
    for _ in range(WALL_REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def alone(tokenizer: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[[], None]:
    """The same calls of the tokenizer and nothing else."""
    return lambda: [tokenizer(*texts, **options) for texts, options in calls] and None


def in_rust(tokenizer: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[[], None]:
    """The part of them that runs on all cores."""
    batches = [(list(zip(*texts, strict=True)) if len(texts) > 1 else texts[0]) for texts, _ in calls if isinstance(texts[0], list)]
    return lambda: [tokenizer.backend_tokenizer.encode_batch(batch) for batch in batches] and None


def measured(name: str, framing_of: Callable[[Task, Any], Framing], tokenizer: Any) -> dict[str, Any]:
    data = load_task(name)
    count, share = len(data.train), len(data.train) / sum(map(len, data.splits.values()))
    framing, listening = framing_of(data.task, tokenizer), Listening(tokenizer)
    lengths = [len(ids) for one in framing_of(data.task, listening).encode(data.train) for ids in sequences(one)]
    calls = listening.calls
    loading, making, floor, rust = seconds(
        lambda: load_task(name), lambda: framing.encode(data.train), alone(tokenizer, calls), in_rust(tokenizer, calls)
    )
    tokens.encoded(framing, data)
    [again] = seconds(lambda: tokens.encoded(framing, data))
    whole = loading * share + making
    rates = {"whole": whole, "two_cores": whole - rust / 2, "floor": floor, "load": loading * share, "encode": making, "from_cache": again}
    return {
        "task": name,
        "framing": framing.name,
        "rows": count,
        "median_tokens": statistics.median(lengths),
        **{f"{part}_per_second": round(count / taken) for part, taken in rates.items()},
    }


def waited_for(name: str, framing_of: Callable[[Task, Any], Framing], tokenizer: Any) -> dict[str, Any]:
    """First and second use of all three splits by the clock."""
    data = load_task(name)
    framing, count = framing_of(data.task, tokenizer), sum(map(len, data.splits.values()))
    features = [one for rows in data.splits.values() for one in framing.encode(rows)]
    tokens.encoded(framing, data)
    share = len(data.train) / count

    def first() -> None:
        for rows in load_task(name).splits.values():
            framing.encode(rows)

    def second() -> None:
        tokens.encoded(framing, load_task(name))

    first_seconds, second_seconds = waited(first), waited(second)
    return {
        "task": name,
        "framing": framing.name,
        "rows": count,
        "median_tokens": statistics.median(len(ids) for one in features for ids in sequences(one)),
        "whole_per_second": round(count / first_seconds),
        "again_per_second": round(count / second_seconds),
        "again_train_share": round(share, 3),
    }


def sequences(feature: dict[str, Any]) -> list[list[int]]:
    """The token ids of one example, which are several of a choice."""
    return [one["input_ids"] for one in feature.get(SEVERAL, [feature])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--wall", action="store_true")
    arguments = parser.parse_args()
    minilm, smollm = load_tokenizer("minilm"), load_tokenizer("smollm2-135m")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DELTATUNE_CACHE"] = folder
        tokens.FEWEST = 1
        for name in arguments.tasks.split(","):
            look = waited_for if arguments.wall else measured
            found.append(look(name, lambda task, tokenizer: HeadFraming(task, tokenizer, LENGTH), minilm))
            found.append(look(name, lambda task, tokenizer: TextToTextFraming(task, tokenizer, LENGTH), smollm))
    unit = f"examples a second by the clock, {os.cpu_count()} cores" if arguments.wall else "examples a processor second"
    print(json.dumps({"unit": unit, "max_length": LENGTH, "bar": BAR, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
