"""Rule 8 on whole backbones: deltas of any methods act together, train together, leave in any order, and are one artefact.

How two deltas act together depends on how each acts, so every way of acting meets every other, and every method one of each kind.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, cycle
from pathlib import Path

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.injection.delta import Delta
from deltatune.methods.kinds import OutputPatch, PrefixPatch, PromptPatch, SelectionPatch, WeightPatch
from tests.conformance.cells import TAKEN, TRAINING, Cell, fresh, moved, plain, shake, small
from tests.conformance.sample import representatives
from tests.conformance.trace import trace
from tests.models import output

MODELS = ("bert", "t5", "tied_mlp", "llama")
OF_EACH_KIND = (OutputPatch, WeightPatch, PrefixPatch, PromptPatch, SelectionPatch)
"""Context has two, which reach a model by quite different ways."""


def _pairs() -> list[tuple[Cell, Cell]]:
    """Ways of acting with ways of acting on every model; methods with one of each kind on one model after the other."""
    pairs = {}
    for model in MODELS:
        for a, b in combinations_with_replacement(representatives(model).values(), 2):
            pairs[Cell(a, model), Cell(b, model)] = None
    turn = cycle(MODELS)
    for method in TRAINING:
        own = [model for model in MODELS if Cell(method, model) in TAKEN]
        for act in OF_EACH_KIND:
            model = next((model for model in (next(turn) for _ in MODELS) if model in own and act in representatives(model)), None)
            if model is not None:
                pairs[Cell(method, model), Cell(representatives(model)[act], model)] = None
    return list(pairs)


TOGETHER = _pairs()
ARTEFACTS = [(a, b) for a, b in TOGETHER if a.model == "bert"]


def ids(pair: tuple[Cell, Cell]) -> str:
    return f"{pair[0]}-{pair[1].method}"


def _attach_both(pair: tuple[Cell, Cell], backbone: nn.Module) -> tuple[Delta, Delta]:
    """Two deltas, trained alone one after the other and then enabled together."""
    both = []
    for k, cell in enumerate(pair):
        both.append(cell.attach(backbone, name="ab"[k]))
        shake(both[k], seed=k)
        both[k].disable()
    for delta in both:
        delta.enable()
    return both[0], both[1]


def test_every_way_of_acting_meets_every_other_and_every_method_one_of_each_kind() -> None:
    met = {(a.method, b.method) for a, b in TOGETHER}
    every = representatives("bert")
    assert {every[act] for act in OF_EACH_KIND} <= set(every.values())
    for a, b in combinations_with_replacement(every.values(), 2):
        assert {(a, b), (b, a)} & met
    for method in TRAINING:
        if Cell(method, "bert") in TAKEN and Cell(method, "t5") in TAKEN:
            assert {every[act] for act in OF_EACH_KIND} <= {b for a, b in met if a == method}, method


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
def test_any_two_act_and_train_together_and_leave_in_any_order(pair: tuple[Cell, Cell]) -> None:
    backbone, inputs = pair[0].fresh()
    before = trace(backbone)
    a, b = _attach_both(pair, backbone)
    with torch.no_grad():
        both = output(backbone, inputs)
        b.disable()
        alone = output(backbone, inputs)
        b.enable()
        assert torch.equal(output(backbone, inputs), both)
        with dt.disabled(backbone):
            assert torch.equal(output(backbone, inputs), plain(pair[0].model))
        assert torch.equal(output(backbone, inputs), both)
    assert moved(both, alone) > 1e-6
    _check_gradients(backbone, inputs, a, b)
    dt.detach(a)
    a = pair[0].attach(backbone, name="again")
    dt.detach(b)
    dt.detach(a)
    assert trace(backbone).differences(before) == []
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain(pair[0].model))


def _check_gradients(backbone: nn.Module, inputs: dict[str, torch.Tensor], a: Delta, b: Delta) -> None:
    output(backbone, inputs).float().square().mean().backward()
    live = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    own = {id(parameter) for delta in (a, b) for parameter in delta.parameters()}
    assert live <= own
    assert all(parameter.grad is not None for parameter in (*a.parameters(), *b.parameters()) if id(parameter) in live)
    assert any(parameter.grad.abs().max() > 0 for parameter in b.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("pair", ARTEFACTS, ids=ids)
@torch.no_grad()
def test_a_composition_is_one_artefact(pair: tuple[Cell, Cell], tmp_path: Path) -> None:
    backbone, inputs = pair[0].fresh()
    before = trace(backbone)
    both = _attach_both(pair, backbone)
    composition = dt.compose(backbone, both, "weighted", weights=[0.7, 0.4], name="both")
    expected = output(backbone, inputs)
    dt.save(composition, tmp_path / "both", unfinished=True)
    other, _ = pair[0].fresh()
    loaded = dt.load(other, tmp_path / "both")
    assert isinstance(loaded, dt.Composition)
    assert [delta.method for delta in loaded.deltas] == [delta.method for delta in both]
    assert torch.equal(output(other, inputs), expected)
    composition.dissolve()
    for delta in reversed(dt.deltas(backbone)):
        dt.detach(delta)
    assert trace(backbone).differences(before) == []


@pytest.mark.parametrize("how", ["sequential", "parallel", "weighted", "gated"])
@torch.no_grad()
def test_virtual_positions_concatenate_whatever_how_says(how: str) -> None:
    for method in ("prefix-tuning", "prompt-tuning"):
        backbone, inputs = fresh("llama")
        pair = [dt.attach(backbone, small(method), name=name) for name in ("a", "b")]
        for k, delta in enumerate(pair):
            shake(delta, seed=k)
        expected = output(backbone, inputs)
        dt.compose(backbone, pair, how, weights=[0.2, 0.9] if how == "weighted" else None)  # type: ignore[arg-type]
        assert torch.equal(output(backbone, inputs), expected)
