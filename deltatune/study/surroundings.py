"""The machine and the software a trial runs on, as a store keeps them."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltatune.training.run import installed_versions


@dataclass(frozen=True)
class Surroundings:
    """A machine with its software.

    Attributes:
        machine: processor, cores, memory, GPU.
        versions: of Python and the packages underneath.
    """

    machine: dict[str, Any]
    versions: dict[str, str]


@functools.cache
def surroundings() -> Surroundings:
    """Of this process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "gpu": gpu,
    }
    return Surroundings(machine, {**installed_versions(), "cuda": str(torch.version.cuda)} if gpu else installed_versions())


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return None
