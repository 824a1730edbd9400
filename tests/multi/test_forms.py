"""Each operator is the loop over rows, and each form is what its patch computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.injection.slot import slot_of
from deltatune.methods import IA3, Adapter, BitFit, DoRA, LoRA, NormTuning, VeRA
from deltatune.multi.act import RouteAct
from deltatune.multi.forms import FORMS
from deltatune.multi.lanes import Lanes
from deltatune.multi.operators.choice import DENSE, GATHER, SEGMENT, choose
from deltatune.multi.operators.native import Native
from deltatune.multi.operators.operator import Operator
from deltatune.multi.picks import Picks
from deltatune.multi.table import FIRST, Table
from tests.conformance.cells import fresh, shake
from tests.multi.rows import batch, routed

CPU = torch.device("cpu")
LANES = ((0, 1, 2, 0), (1, 1, 1, 1), (3, 2, 1, 0), (0, 0, 0, 0))


def tables(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(4, 6, 4, generator=generator), torch.randn(4, 4, 5, generator=generator)
    A[0], B[0] = 0, 0
    return A, B


@pytest.mark.parametrize("operator", [GATHER, SEGMENT, DENSE], ids=lambda operator: type(operator).__name__)
@pytest.mark.parametrize("lanes", LANES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("training", [False, True])
def test_operators_are_the_loop(operator: Operator, lanes: tuple[int, ...], tokens: int, training: bool) -> None:
    A, B = tables()
    own = Lanes({"A": A, "B": B}, Picks(lanes, CPU), lasts=True)
    x, y = (torch.randn(4, tokens, width, generator=torch.Generator().manual_seed(width)) for width in (6, 5))
    with torch.set_grad_enabled(training):
        for _ in range(3):  # from the second on with copies that are kept
            own.begin()
            torch.testing.assert_close(operator.matrix(x, own, "A"), torch.stack([x[i] @ A[lane] for i, lane in enumerate(lanes)]))
            pairs = torch.stack([x[i] @ A[lane] @ B[lane] for i, lane in enumerate(lanes)])
            torch.testing.assert_close(operator.pair(x, own, "A", "B"), pairs)
            torch.testing.assert_close(operator.added(y, x, own, "A", "B"), y + pairs)
            out = y.clone()
            assert operator.added(out, x, own, "A", "B", out).data_ptr() == out.data_ptr()
            torch.testing.assert_close(out, y + pairs)
        shortcut, out = operator.shortcut(y, own, "A", "B"), y.clone()
        assert (shortcut is not None) == (operator is not SEGMENT)
        if shortcut is not None:
            shortcut(x, out)
            torch.testing.assert_close(out, y + pairs)


def test_the_shape_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "is_available", staticmethod(lambda: False))
    A = torch.zeros(40, 6, 8)
    numbers = tuple(range(1, 33)), (1, 2) * 16, (1, 2, 3, 4, 5) * 6
    many, few, some = (Lanes({"A": A}, Picks(own, CPU), whole=lambda lanes: True) for own in numbers)
    assert choose(torch.zeros(32, 1, 6), many, "A", 8) is GATHER
    assert choose(torch.zeros(32, 16, 6), many, "A", 8) is SEGMENT
    assert choose(torch.zeros(32, 1, 6), few, "A", 8) is choose(torch.zeros(32, 16, 6), few, "A", 8) is DENSE
    assert choose(torch.zeros(30, 1, 6), some, "A", 8) is DENSE
    assert choose(torch.zeros(30, 16, 6), some, "A", 8) is SEGMENT
    broken = Lanes({"A": A}, few.picks, whole=lambda lanes: False)
    assert choose(torch.zeros(32, 1, 6), broken, "A", 8) is GATHER, "NaN times 0 is NaN"
    trained = Lanes({"A": A.requires_grad_()}, many.picks)
    assert choose(torch.zeros(32, 1, 6), trained, "A", 8) is SEGMENT, "its gradient is a batched product, too"


def test_copies_of_few_lanes_are_kept_from_the_second_forward_on() -> None:
    A, _ = tables()
    lasting, passing = (Lanes({"A": A}, Picks((1, 2, 1), CPU), lasts=lasts) for lasts in (True, False))
    assert [lasting.begin(), passing.begin(), passing.begin()] == [False, False, False]
    assert lasting.beside("A", A.dtype) is not lasting.beside("A", A.dtype)
    assert lasting.begin()
    assert lasting.beside("A", A.dtype) is lasting.beside("A", A.dtype)
    assert passing.beside("A", A.dtype) is not passing.beside("A", A.dtype)
    assert lasting.beside("A", torch.float64).dtype == torch.float64


@torch.no_grad()
def test_the_definition_of_every_form_is_what_its_patch_computes() -> None:
    """One lane by the form's formula, against the module with that delta attached and no route."""
    backbone, _ = fresh("bert")
    methods = {"a": LoRA(rank=3), "b": IA3(), "c": BitFit(), "d": Adapter(bottleneck_dim=3), "e": DoRA(rank=2), "f": VeRA(rank=4)}
    methods |= {"g": NormTuning(), "h": LoRA(rank=2)}
    for seed, (name, method) in enumerate(methods.items()):
        where = "embedding" if name == "h" else None
        shake(dt.attach(backbone, method, where, name=name), seed=seed)
    dt.switch(backbone, None)
    seen = set()
    routed(backbone, list(methods), batch(len(methods)))
    for module in backbone.modules():
        slot = slot_of(module)
        act = slot.acts.get(RouteAct) if slot is not None else None
        for name in methods if isinstance(act, RouteAct) else ():
            assert act is not None
            placed = [(table, table.lanes[lane]) for lane in act.tables.lanes_of(name) if (table := act.tables.table_of[lane]) is not None]
            tables = [(table, {letter: tensor[lane] for letter, tensor in table.tensors.items()}) for table, lane in placed]
            if not tables:
                continue
            seen |= {table.form.name for table, _ in tables}
            x = sample(module)
            given, y = defined(module, x, tables)
            dt.switch(backbone, name)
            torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
            dt.switch(backbone, None)
            for table, own in tables:
                check_many(table, own, given, module(given))
    assert seen == set(FORMS) - {"stacked"}


def defined(module: nn.Module, x: Tensor, tables: list[tuple[Table, dict[str, Tensor]]]) -> tuple[Tensor, Tensor]:
    """What the module is given, and returns, by the formulas of these lanes."""
    for table, own in tables:
        x = torch.stack([table.form.one(row, row, own, table) for row in x]) if table.key.stage == "input" else x
    y: Tensor = module(x)
    for stage in ("module", "output"):
        for table, own in tables:
            if table.key.stage == stage:
                y = torch.stack([table.form.one(*rows, own, table) for rows in zip(x, y, strict=True)])
    return x, y


def check_many(table: Table, own: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    """A row with this lane and one without, by the form for many rows."""
    lane = next(lane for lane in table.lanes.values() if all(torch.equal(table.tensors[name][lane], one) for name, one in own.items()))
    y = x if table.key.stage == "input" else y
    found = table.form.many(x, y, Lanes(table.tensors, Picks((lane, 0), CPU)), table)
    torch.testing.assert_close(found[0], table.form.one(x[0], y[0], own, table), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], y[1], rtol=1e-6, atol=1e-6, msg="lane 0 changes nothing")


def sample(module: nn.Module) -> Tensor:
    """Two rows of three tokens, as the module takes them."""
    draw = torch.Generator().manual_seed(5)
    if isinstance(module, nn.Embedding):
        return torch.randint(1, min(20, module.num_embeddings), (2, 3), generator=draw)
    return torch.randn(2, 3, module.in_features if isinstance(module, nn.Linear) else 32, generator=draw)


@torch.no_grad()
def test_a_table_grows_and_uses_lanes_again() -> None:
    backbone, _ = fresh("mlp")
    for k in range(FIRST + 1):
        dt.attach(backbone, LoRA(rank=2), "0", name=f"d{k}").disable()
    bank = dt.bank(backbone)
    for k in range(FIRST + 1):
        bank.add(f"d{k}")
    [table] = bank.acts[0].tables
    assert table.tensors["A"].shape[0] == 2 * FIRST
    assert sorted(table.lanes.values()) == list(range(1, FIRST + 2))
    before = table.tensors
    for _ in range(20):
        bank.remove("d1")
        bank.add("d1")
    assert table.tensors is before, "lanes that nobody reads are used again"
    with dt.route(backbone, ["d2", "d3"]) as plan:
        own = next(iter(plan.works.values())).steps[0].outputs[0]
        held = {lane: own.lanes["A"][lane].clone() for lane in own.lanes.picks.distinct}
        for _ in range(20):
            bank.remove("d2")
            bank.add("d2")
        assert all(torch.equal(own.lanes["A"][lane], value) for lane, value in held.items()), "an open route reads what it read"
