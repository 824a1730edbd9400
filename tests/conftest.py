"""Settings every test shares: one thread per process, because the runners have two cores, no model hub, and no waiting for the disk."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def _not_flushed(file: int) -> None:
    """In place of ``os.fsync``: no test cuts the power, and thousands of saves would wait for the disk; processes of their own do flush."""


os.fsync = _not_flushed
