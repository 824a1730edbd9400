"""Methods that train nothing, on every architecture: the backbone computes what it did, and no parameter wants a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.injection.attach import heads_of
from deltatune.injection.ledger import ledger_of
from tests.conformance.cells import CONTROLS, Cell, plain
from tests.conformance.trace import trace
from tests.models import MODELS, output

CELLS = [Cell(method, model) for method in CONTROLS for model in MODELS]


@pytest.mark.parametrize("control", CELLS, ids=str)
def test_a_control_changes_nothing(control: Cell, tmp_path: Path) -> None:
    backbone, inputs = control.fresh()
    before = trace(backbone)
    delta = control.attach(backbone)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain(control.model))
    for toggle in (delta.freeze, delta.unfreeze, delta.disable, delta.enable):
        toggle()
        assert [name for name, parameter in backbone.named_parameters() if parameter.requires_grad] == []
    assert delta.trained_parameters() == {}
    assert (delta.budget().delta, delta.budget().ratio) == (0, 0)
    dt.detach(delta)
    assert trace(backbone).differences(before) == []


@pytest.mark.parametrize("control", CELLS, ids=str)
@torch.no_grad()
def test_its_file_brings_back_the_head_that_was_scored(control: Cell, tmp_path: Path) -> None:
    backbone, inputs = control.fresh()
    delta = control.attach(backbone)
    ledger = ledger_of(backbone)
    assert ledger is not None
    heads = heads_of(ledger.index(backbone))
    assert sorted(entry.site.path for entry in delta.entries) == sorted(head.path for head in heads for _ in head.all_parameters)
    dt.save(delta, tmp_path / "control")
    other, _ = control.fresh()
    for head in heads:
        for parameter in other.get_submodule(head.path).parameters():
            parameter.add_(1)
    dt.load(other, tmp_path / "control")
    assert torch.equal(output(other, inputs), plain(control.model))
