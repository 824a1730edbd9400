"""Paired timing for shared, noisy machines: competitors take turns in one run, and what is quoted is the median of ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def interleave(competitors: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every competitor once a round; each returns its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for k in range(rounds):
        names = list(competitors)
        for name in names if k % 2 == 0 else reversed(names):
            seconds[name].append(competitors[name]())
        print(f"\rround {k + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def report(question: str, **findings: Any) -> None:
    """One JSON object: the question, what was found, and on what."""
    print(json.dumps({"question": question, **findings, "machine": machine()}, indent=2))


def machine() -> dict[str, Any]:
    """What it was measured on and with: processor, cores, memory, and the versions that decide numbers, peers' included."""
    import torch

    versions = {name: version(name) for name in ("transformers", "peft") if find_spec(name) is not None}
    device = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _told("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int((_told("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 1e6),
        **device,
        **versions,
    }


def _told(file: str, name: str) -> str | None:
    """What Linux tells under a name."""
    place = Path(file)
    lines = place.read_text().splitlines() if place.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
