"""What a stretch of work costs: seconds a step, and the most memory it held."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """The most memory held since the beginning of a block, in bytes: on the GPU where there is one, else of this process.

    Attributes:
        bytes: the peak; of the whole process's life where the system cannot start anew.
    """

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the block's peak."""
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    try:
        yield peak
    finally:
        peak.bytes = most_memory()


def most_memory() -> int:
    """The peak so far, in bytes: on the GPU where there is one, else of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _process_peak()


def _forget_peak() -> None:
    """Linux starts the high-water mark anew on request; elsewhere it stays that of the process's life."""
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:  # not permitted in some containers
            return


def resident() -> int | None:
    """Bytes of this process that lie in memory now; None where the system does not tell."""
    return _told("VmRSS:")


def available() -> int | None:
    """Bytes that are free where training happens: on the GPU, else of the machine; None where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return _told("MemAvailable:", Path("/proc/meminfo"))


def _told(name: str, file: Path = _STATUS) -> int | None:
    """What Linux tells under a name, in bytes."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _process_peak() -> int:
    if (peak := _told("VmHWM:")) is not None:
        return peak
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class StepTimer(TrainerCallback):
    """Times each optimiser step, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median, the first step left out where there are others."""
        return statistics.median(self.seconds[1:] or self.seconds or [0.0])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        wait()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it."""
        wait()
        self.seconds.append(time.perf_counter() - self._began)


def wait() -> None:
    """Until a GPU is done, which works on behind the clock's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
