"""Rule 8: deltas of any methods act together, in order, by the formulas, and are kept as one artefact."""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import DeltaError, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import Composition, compose
from deltatune.injection.delta import Delta
from deltatune.injection.mixers import Gate
from deltatune.injection.switching import deltas, disabled
from deltatune.methods import methods
from tests.conformance.cells import REFUSED, Cell, fresh, moved, shake, small
from tests.conformance.trace import trace
from tests.models import output

PAIRS = list(combinations_with_replacement(methods, 2))
MODELS = ("bert", "t5", "tied_mlp")
TOGETHER = [
    (Cell(a, model), Cell(b, model)) for model in MODELS for a, b in PAIRS if not {model} & (REFUSED.get(a, set()) | REFUSED.get(b, set()))
]
MIXED = [(a, b) for a, b in TOGETHER if a.model == "bert"]


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


def test_the_pairs_are_all_there() -> None:
    assert len(PAIRS) == len(methods) * (len(methods) + 1) // 2
    assert {method for pair in MIXED for method in (pair[0].method, pair[1].method)} == set(methods)


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
@torch.no_grad()
def test_any_two_act_together_and_leave_in_any_order(pair: tuple[Cell, Cell]) -> None:
    backbone, inputs = pair[0].fresh()
    before, plain = trace(backbone), output(backbone, inputs)
    a, b = _attach_both(pair, backbone)
    both = output(backbone, inputs)
    b.disable()
    alone = output(backbone, inputs)
    b.enable()
    assert torch.equal(output(backbone, inputs), both)
    with disabled(backbone):
        assert torch.equal(output(backbone, inputs), plain)
    assert torch.equal(output(backbone, inputs), both)
    assert moved(both, alone) > 1e-6
    detach(a)
    a = pair[0].attach(backbone, name="again")
    detach(b)
    detach(a)
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize("pair", TOGETHER, ids=ids)
def test_both_get_their_own_gradients(pair: tuple[Cell, Cell]) -> None:
    backbone, inputs = pair[0].fresh()
    a, b = _attach_both(pair, backbone)
    output(backbone, inputs).float().square().mean().backward()
    live = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    own = {id(parameter) for delta in (a, b) for parameter in delta.parameters()}
    assert live <= own
    assert all(parameter.grad is not None for parameter in (*a.parameters(), *b.parameters()) if id(parameter) in live)
    assert any(parameter.grad.abs().max() > 0 for parameter in b.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("pair", MIXED, ids=ids)
@torch.no_grad()
def test_a_composition_is_one_artefact(pair: tuple[Cell, Cell], tmp_path: Path) -> None:
    backbone, inputs = pair[0].fresh()
    both = _attach_both(pair, backbone)
    composition = compose(backbone, both, "weighted", weights=[0.7, 0.4], name="both")
    expected, plain = output(backbone, inputs), trace(fresh(pair[0].model)[0])
    save(composition, tmp_path / "both", unfinished=True)
    other, _ = pair[0].fresh()
    loaded = load(other, tmp_path / "both")
    assert isinstance(loaded, Composition)
    assert [delta.method for delta in loaded.deltas] == [delta.method for delta in both]
    assert torch.equal(output(other, inputs), expected)
    composition.dissolve()
    for delta in reversed(deltas(backbone)):
        detach(delta)
    assert [found for found in trace(backbone).differences(plain) if found.startswith("bits")] == []


WIDTH_IN, WIDTH_OUT = 6, 5
ON_ONE_LINEAR = tuple(name for name in methods if name not in ("prefix-tuning", "prompt-tuning", "trainable-tokens", "linear-probe"))
BY_WEIGHT = ("bitfit", "diff-pruning", "full")
"""Of those, the methods that change the parameters: they add up before any output is edited."""


def _linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH_IN, WIDTH_OUT)).eval(), torch.randn(3, WIDTH_IN)


def _on_one_linear(*names: str) -> tuple[nn.Sequential, Tensor, list[Delta]]:
    backbone, x = _linear()
    found = []
    for k, method in enumerate(names):
        found.append(attach(backbone, small(method), "0", name=f"d{k}"))
        shake(found[k], spread=0.5, seed=k)
        found[k].disable()
    for delta in found:
        delta.enable()
    return backbone, x, found


def test_who_changes_parameters() -> None:
    for method in ON_ONE_LINEAR:
        kind = methods[method].kind
        assert (kind in ("weight", "selection")) == (method in BY_WEIGHT), method


@pytest.mark.parametrize("how", ["parallel", "weighted"])
@pytest.mark.parametrize("names", list(product(ON_ONE_LINEAR, repeat=2)), ids="-".join)
@torch.no_grad()
def test_side_by_side_by_the_formula(names: tuple[str, str], how: str) -> None:
    weights = (1.0, 1.0) if how == "parallel" else (0.3, -1.7)
    backbone, x, pair = _on_one_linear(*names)
    outputs = []
    for delta in pair:
        for other in pair:
            (other.enable if other is delta else other.disable)()
        outputs.append(backbone(x))
    with disabled(backbone):
        plain = backbone(x)
    compose(backbone, pair, how, weights=weights if how == "weighted" else None)  # type: ignore[arg-type]
    found = backbone(x)
    inner = [delta for delta, method in zip(pair, names, strict=True) if method in BY_WEIGHT]
    if len(inner) in (0, 2):
        expected = plain + sum(w * (y - plain) for w, y in zip(weights, outputs, strict=True))
    else:  # the weight changes first; the output patch edits what it gives
        k = names.index(next(method for method in names if method in BY_WEIGHT))
        base = plain + weights[k] * (outputs[k] - plain)
        edited = _edit(pair[1 - k], x, base)
        expected = base + weights[1 - k] * (edited - base)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()


def _edit(delta: Delta, x: Tensor, y: Tensor) -> Tensor:
    for patch in delta.patches:
        y = patch(x, y)
    return y


@pytest.mark.parametrize("names", list(product(ON_ONE_LINEAR, repeat=2)), ids="-".join)
@torch.no_grad()
def test_one_after_the_other_by_the_formula(names: tuple[str, str]) -> None:
    backbone, x, pair = _on_one_linear(*names)
    found = backbone(x)
    changing = [delta for delta, method in zip(pair, names, strict=True) if method in BY_WEIGHT]
    editing = [delta for delta in pair if delta not in changing]
    for delta in editing:
        delta.disable()
    expected = backbone(x)
    for delta in editing:
        expected = _edit(delta, x, expected)
        delta.enable()
    assert torch.allclose(found, expected, atol=1e-6)
    for delta in pair:
        delta.disable()
    composed = compose(backbone, pair, "sequential")
    assert torch.allclose(backbone(x), found, atol=1e-6)
    composed.dissolve()
    assert torch.allclose(backbone(x), found, atol=1e-6)


@pytest.mark.parametrize("names", list(product(ON_ONE_LINEAR, repeat=2)), ids="-".join)
def test_gates_weigh_tokens_or_are_refused(names: tuple[str, str]) -> None:
    backbone, x, pair = _on_one_linear(*names)
    if any(method in BY_WEIGHT for method in names):
        with torch.no_grad():
            before = backbone(x)
        with pytest.raises(Unsupported, match="how='weighted'"):
            compose(backbone, pair, "gated")
        with torch.no_grad():
            assert torch.equal(backbone(x), before)
        return
    with disabled(backbone):
        y = backbone(x).detach()
    composition = compose(backbone, pair, "gated")
    (gate,) = composition.mixers().values()
    assert isinstance(gate, Gate)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    g = torch.sigmoid(y @ gate.U + gate.c)  # (tokens, members)
    changes = torch.stack([_edit(delta, x, y) - y for delta in pair], dim=-1)  # (tokens, width, members)
    found = backbone(x)
    assert torch.allclose(found, y + (changes * g[:, None]).sum(-1), atol=1e-5)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in composition.parameters())


@pytest.mark.parametrize("how", ["sequential", "parallel", "weighted", "gated"])
@torch.no_grad()
def test_virtual_positions_concatenate_whatever_how_says(how: str) -> None:
    for method in ("prefix-tuning", "prompt-tuning"):
        backbone, inputs = fresh("llama")
        pair = [attach(backbone, small(method), name=name) for name in ("a", "b")]
        for k, delta in enumerate(pair):
            shake(delta, seed=k)
        expected = output(backbone, inputs)
        compose(backbone, pair, how, weights=[0.2, 0.9] if how == "weighted" else None)  # type: ignore[arg-type]
        assert torch.equal(output(backbone, inputs), expected)


def test_members_are_not_moved_behind_their_composition() -> None:
    backbone, x, (a, b) = _on_one_linear("lora", "ia3")
    composition = compose(backbone, [a, b], "parallel", name="pair")
    for act in (a.disable, a.enable, lambda: detach(a)):
        if act == a.enable:
            continue
        with pytest.raises(Unsupported, match="acts within the composition `pair`"):
            act()
    assert composition.enabled
    composition.disable()
    with torch.no_grad():
        plain, _ = _linear()
        assert torch.equal(backbone(x), plain(x))
    composition.enable()
    composition.dissolve()
    with pytest.raises(Unsupported, match=r"was dissolved\. Compose its deltas again"):
        composition.enable()
    detach(a)
    detach(b)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(how="sideways"), r"how='sideways'; it is one of `sequential`, `parallel`, `weighted`, `gated`, `fusion`"),
        (dict(how="weighted"), r"weights=None for 2 members and how='weighted'"),
        (dict(how="weighted", weights=[1.0]), r"`weighted` takes one weight a member"),
        (dict(how="parallel", weights=[1.0, 1.0]), r"the others none"),
        (dict(name="d0"), r"called `d0` is attached already\. .*another name"),
        (dict(members=["d0"]), "it takes at least two different deltas"),
        (dict(members=["d0", "d0"]), "it takes at least two different deltas"),
        (dict(members=["d0", "d9"]), r"No delta called `d9` is attached to this backbone\. Did you mean"),
    ],
)
def test_what_cannot_be_composed_says_so(asked: dict[str, object], message: str) -> None:
    backbone, x, _ = _on_one_linear("lora", "ia3")
    with torch.no_grad():
        before = backbone(x)
    with pytest.raises(DeltaError, match=message):
        compose(backbone, **{"members": ["d0", "d1"]} | asked)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(backbone(x), before)
