"""Settings every test shares: one thread per process, because the runners have two cores, no model hub, and no waiting for the disk."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def _not_flushed(file: int) -> None:
    """In place of ``os.fsync``: no test cuts the power, and thousands of saves would wait for the disk; processes of their own do flush."""


os.fsync = _not_flushed

_collect = gc.collect


def _collected(generation: int = 2) -> int:
    """In place of ``gc.collect``: accelerate's, twice a training, would walk over all that the tests so far have imported and made."""
    return 0 if str(sys._getframe(1).f_globals.get("__name__")).startswith("accelerate.") else _collect(generation)


gc.collect = _collected


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the compiled loops in it."""
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    from deltatune.compiled.library import compile_library

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTATUNE_CACHE", str(folder))
        compile_library()
    return folder


@pytest.fixture
def compiled(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled loops are there, and loaded."""
    from deltatune.compiled.library import is_compiled

    monkeypatch.setenv("DELTATUNE_CACHE", str(library))
    is_compiled.cache_clear()
    assert is_compiled()
    yield
    is_compiled.cache_clear()
