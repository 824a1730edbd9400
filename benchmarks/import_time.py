"""How much longer does ``import deltatune`` take than ``import torch``? Bar: 0.2 s."""

from __future__ import annotations

import statistics
import subprocess
import sys

from paired import interleave, report

PROGRAM = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(module=module)], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    found = interleave({"torch": lambda: seconds("torch"), "deltatune": lambda: seconds("deltatune")}, rounds=9)
    extra = statistics.median(b - a for a, b in zip(found["torch"], found["deltatune"], strict=True))
    report("seconds of `import deltatune` beyond `import torch`", extra_seconds=round(extra, 3), bar=0.2, holds=extra <= 0.2)
