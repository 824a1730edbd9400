"""What is done to an attached delta only changes the state of its slots: ``torch.compile`` ignores hooks that come later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods import LoRA
from tests.conformance.cells import MERGING, TAKEN, Cell, fresh, shake
from tests.conformance.sample import pairwise
from tests.conformance.trace import HOOKS


def _hooks(backbone: nn.Module) -> list[tuple[str, str, int, int]]:
    """Every hook there is, by its place, its handle's number and its object."""
    return [
        (path, kind, key, id(hook.__func__) if hasattr(hook, "__func__") else id(hook))
        for path, module in backbone.named_modules()
        for kind in HOOKS
        for key, hook in getattr(module, kind).items()
    ]


def _verbs(cell: Cell, backbone: nn.Module, delta: dt.Delta) -> dict[str, Callable[[], object]]:
    verbs: dict[str, Callable[[], object]] = {
        "disable": delta.disable,
        "enable": delta.enable,
        "freeze": delta.freeze,
        "unfreeze": delta.unfreeze,
        "switch to none": lambda: dt.switch(backbone, None),
        "switch": lambda: dt.switch(backbone, delta.name),
    }
    return verbs | {"merge": lambda: dt.merge(delta), "unmerge": lambda: dt.unmerge(delta)} if cell in MERGING else verbs


@pytest.mark.parametrize("cell", pairwise(TAKEN, ("method",), ("act", "sort")), ids=str)
@torch.no_grad()
def test_verbs_change_no_hooks(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = cell.fresh()
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    delta = cell.attach(backbone)
    shake(delta)
    attached = _hooks(backbone)
    resets.clear()
    for verb, act in _verbs(cell, backbone, delta).items():
        act()
        assert _hooks(backbone) == attached, verb
    with dt.disabled(backbone):
        assert _hooks(backbone) == attached, "disabled"
    second = cell.attach(backbone, name="second")
    assert _hooks(backbone) == attached, "a second delta at the same sites"
    dt.detach(second)
    assert _hooks(backbone) == attached, "the second delta gone"
    assert resets == [], "what was compiled stays compiled"


def test_slots_that_come_and_go_make_what_was_compiled_compile_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = fresh("bert")
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    first = dt.attach(backbone, LoRA(rank=2), "attention.query")
    assert resets
    resets.clear()
    second = dt.attach(backbone, LoRA(rank=2), "attention.query")
    dt.detach(second)
    assert not resets
    dt.detach(first)
    assert resets
