"""What a training frees stays with the process meanwhile, and goes back to the system behind it.

Each in a process of its own: a heap that other tests have used may hold a hole of any size, and others change what is resident.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from deltatune.training.freed import _glibc

pytestmark = pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")


def printed(program: str) -> Any:
    """What a program prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_large_tensors_take_the_same_memory_again() -> None:
    within, after_the_inner, outside, pages = printed("""
        import resource
        import torch
        from deltatune.training.freed import keeping_freed

        BYTES = 48 * 2**20

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.zeros(BYTES // 4).add_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with keeping_freed():
            faults()  # what is kept has to be taken first
            with keeping_freed():
                within = faults()
            after_the_inner = faults()
        print([within, after_the_inner, faults(), 10 * BYTES // resource.getpagesize()])
    """)
    assert within < pages / 4 and after_the_inner < pages / 4
    assert outside > max(3 * within, 100), "without it, the system is asked again each time, in pages of whatever size"


def test_it_is_given_back() -> None:
    lost = printed("""
        import torch
        from deltatune.training.freed import keeping_freed

        def resident():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

        with keeping_freed():
            torch.ones(2**26)
            held = resident()
        print(held - resident())
    """)
    assert lost > 0.9 * 2**26 * 4 / 1024
