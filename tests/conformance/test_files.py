"""What is saved comes back on another instance of the backbone, with the same outputs and the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from tests.conformance.cells import TAKEN, Cell, plain, shake
from tests.conformance.sample import pairwise
from tests.models import output


@pytest.mark.parametrize("cell", pairwise(TAKEN, ("method",), ("act", "sort"), ("model",)), ids=str)
@torch.no_grad()
def test_a_file_brings_the_delta_back(cell: Cell, tmp_path: Path) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone, name="saved")
    shake(delta)
    expected = output(backbone, inputs)
    dt.save(delta, tmp_path / "one", unfinished=True)
    other, _ = cell.fresh()
    loaded = dt.load(other, tmp_path / "one")
    assert loaded.method == delta.method
    assert torch.equal(output(other, inputs), expected)
    dt.save(loaded, tmp_path / "two", unfinished=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [(tmp_path / "one" / name).read_bytes() for name in names] == [(tmp_path / "two" / name).read_bytes() for name in names]
    dt.detach(loaded)
    assert torch.equal(output(other, inputs), plain(cell.model))
