"""Rule 8 on one linear map: what deltas compute together is what the formulas of ``injection.outputs`` say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import DeltaError, NoSite, Unsupported
from deltatune.injection.delta import Delta
from deltatune.injection.mixers import Gate
from deltatune.methods.kinds import InputPatch, OutputPatch, SelectionPatch, WeightPatch
from tests.conformance.cells import TAKEN, TRAINING, Cell, shake, small
from tests.conformance.sample import acts_of, representatives

WIDTH_IN, WIDTH_OUT = 8, 12
ON_A_LINEAR_MAP = {OutputPatch, InputPatch, WeightPatch, SelectionPatch}
Map = Callable[[Tensor], Tensor]


def _linear() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH_IN, WIDTH_OUT)).eval(), torch.randn(3, WIDTH_IN)


def _sits_there(name: str) -> bool:
    try:
        dt.attach(_linear()[0], small(name), "0")
    except (Unsupported, NoSite):
        return False
    return True


METHODS = [name for name in TRAINING if Cell(name, "mlp") in TAKEN and acts_of(name) <= ON_A_LINEAR_MAP and _sits_there(name)]
PARTNERS = [method for act, method in representatives("mlp").items() if act in ON_A_LINEAR_MAP]
PAIRS = [(method, partner) for method in METHODS for partner in PARTNERS]
IN_ORDER = list(dict.fromkeys([*PAIRS, *((b, a) for a, b in PAIRS)]))


def _on_one_linear(*names: str) -> tuple[nn.Sequential, Tensor, list[Delta]]:
    backbone, x = _linear()
    found = []
    for k, method in enumerate(names):
        found.append(dt.attach(backbone, small(method), "0", name=f"d{k}"))
        shake(found[k], spread=0.5, seed=k)
        found[k].disable()
    for delta in found:
        delta.enable()
    return backbone, x, found


def _changing(pair: Sequence[Delta]) -> list[Delta]:
    """Those that change the parameters: they add up before any input or output is edited."""
    return [delta for delta in pair if any(isinstance(patch, WeightPatch | SelectionPatch) for patch in delta.patches)]


def _around(delta: Delta, inner: Map) -> Map:
    """g(x) = F(inner, x) of one delta that edits inputs and outputs."""

    def g(x: Tensor) -> Tensor:
        seen = x
        for patch in reversed(delta.patches):
            seen = patch(seen) if isinstance(patch, InputPatch) else seen
        y = inner(seen)
        for patch in delta.patches:
            y = patch(x, y) if isinstance(patch, OutputPatch) else y
        return y

    return g


def _only(backbone: nn.Module, acting: Sequence[Delta], pair: Sequence[Delta]) -> Map:
    """The backbone with some deltas of a pair acting."""

    def g(x: Tensor) -> Tensor:
        for delta in pair:
            delta.disable()
        for delta in acting:
            delta.enable()
        return backbone(x)  # type: ignore[no-any-return]

    return g


def test_the_pairs_are_all_there() -> None:
    assert len(PARTNERS) == len(ON_A_LINEAR_MAP)
    assert {"lora", "adapter", "ia3", "bitfit", "diff-pruning", "full"} <= set(METHODS)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@torch.no_grad()
def test_side_by_side_by_the_formula(names: tuple[str, str]) -> None:
    for how, weights in (("parallel", (1.0, 1.0)), ("weighted", (0.3, -1.7))):
        backbone, x, pair = _on_one_linear(*names)
        changing, plain = _changing(pair), _only(backbone, [], pair)
        weight = dict(zip([delta.name for delta in pair], weights, strict=True))

        def base(z: Tensor) -> Tensor:
            y = plain(z)  # noqa: B023
            changes = [weight[d.name] * (_only(backbone, [d], pair)(z) - y) for d in changing]  # noqa: B023
            return y + sum(changes)

        y = base(x)
        expected = y + sum(weight[delta.name] * (_around(delta, base)(x) - y) for delta in pair if delta not in changing)
        dt.compose(backbone, pair, how, weights=weights if how == "weighted" else None)  # type: ignore[arg-type]
        assert torch.allclose(backbone(x), expected, atol=1e-5), (how, float((backbone(x) - expected).abs().max()))


@pytest.mark.parametrize("names", IN_ORDER, ids="-".join)
@torch.no_grad()
def test_one_after_the_other_by_the_formula(names: tuple[str, str]) -> None:
    backbone, x, pair = _on_one_linear(*names)
    found = backbone(x)
    changing = _changing(pair)
    g = _only(backbone, changing, pair)
    for delta in pair:
        g = g if delta in changing else _around(delta, g)
    assert torch.allclose(g(x), found, atol=1e-5), float((g(x) - found).abs().max())
    for delta in pair:
        delta.disable()
    composed = dt.compose(backbone, pair, "sequential")
    assert torch.allclose(backbone(x), found, atol=1e-6)
    composed.dissolve()
    assert torch.allclose(backbone(x), found, atol=1e-6)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_gates_weigh_tokens_or_are_refused(names: tuple[str, str]) -> None:
    backbone, x, pair = _on_one_linear(*names)
    with torch.no_grad():
        before = backbone(x)
    if _changing(pair):
        with pytest.raises(Unsupported, match="how='weighted'"):
            dt.compose(backbone, pair, "gated")
        with torch.no_grad():
            assert torch.equal(backbone(x), before)
        return
    plain = _only(backbone, [], pair)
    y = plain(x).detach()
    changes = torch.stack([(_around(delta, plain)(x) - y).detach() for delta in pair], dim=-1)  # (tokens, width, members)
    composition = dt.compose(backbone, pair, "gated")
    (gate,) = composition.mixers().values()
    assert isinstance(gate, Gate)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    g = torch.sigmoid(y @ gate.U + gate.c)  # (tokens, members)
    found = backbone(x)
    assert torch.allclose(found, y + (changes * g[:, None]).sum(-1), atol=1e-5)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in composition.parameters() if parameter.requires_grad)


def test_members_are_not_moved_behind_their_composition() -> None:
    backbone, x, (a, b) = _on_one_linear("lora", "ia3")
    composition = dt.compose(backbone, [a, b], "parallel", name="pair")
    for act in (a.disable, a.enable, lambda: dt.detach(a)):
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
    dt.detach(a)
    dt.detach(b)


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
        dt.compose(backbone, **{"members": ["d0", "d1"]} | asked)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(backbone(x), before)
