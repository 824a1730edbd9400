"""Saved deltas, and hubs to push them to: a folder, and one in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from tests.checkpoint.deltas import backbone, train, trained

Saved = Callable[..., Path]
_PLACES = count()


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """``saved("a", method="lora", seed=0, task="sst2")``: the folder of a delta on the tiny BERT."""

    def save(name: str, method: str = "lora", seed: int = 0, **about: Any) -> Path:
        model, _ = backbone("bert")
        return dt.save(train(trained(model, method, name=name), seed), tmp_path / "saved" / name, **about)

    return save


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a hub can be."""
    if request.param == "folder":
        yield str(tmp_path / "hub")
        return
    import fsspec

    root = f"memory://hub{next(_PLACES)}"
    yield root
    files = fsspec.filesystem("memory")
    if files.exists(root):
        files.rm(root, recursive=True)
