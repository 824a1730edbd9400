"""What a training frees stays with the process meanwhile, and goes back to the system behind it."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from deltatune.training.freed import _glibc, keeping_freed

only_glibc = pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")

BYTES = 48 * 2**20


def faults() -> int:
    """Page faults of ten large tensors, one made after the other is freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(BYTES // 4).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@only_glibc
def test_large_tensors_take_the_same_memory_again() -> None:
    with keeping_freed():
        faults()  # what is kept has to be taken first
        with keeping_freed():
            within = faults()
        after_the_inner = faults()
    outside = faults()
    pages = 10 * BYTES // resource.getpagesize()
    assert within < pages / 4 and after_the_inner < pages / 4 and outside > pages / 2


@only_glibc
def test_it_is_given_back() -> None:
    """In a process of its own, whose resident memory nobody else changes."""
    program = """
        import torch
        from deltatune.training.freed import keeping_freed

        def resident():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

        with keeping_freed():
            torch.ones(2**26)
            held = resident()
        print(held - resident())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.9 * 2**26 * 4 / 1024
