"""Rule 5: nothing matches silently; every error says what was asked, what was found and what to do, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import DeltaError, Idle, InvalidValue, NoSite, UnknownName, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.ledger import ledger_of
from deltatune.injection.switching import deltas, switch
from deltatune.methods import LoRA, methods
from deltatune.methods.kinds import InputPatch, OutputPatch, SelectionPatch, WeightPatch
from tests.conformance.cells import TAKEN, Cell, fresh, plain, small
from tests.conformance.sample import acts_of
from tests.conformance.trace import trace
from tests.models import HIDDEN, output

ON_BERT = [cell for cell in TAKEN if cell.model == "bert"]


WRONG: tuple[tuple[Any, str], ...] = (
    ("attention.qurey", r"No site of BertForSequenceClassification matches `attention\.qurey`\. Did you mean `attention\.query`"),
    (["*", "layer.7.output"], r"matches `layer\.7\.output`\..*dt\.find_sites"),
    (["*", "!nothing"], r"matches `!nothing`"),
    ("attention.{query,vlaue}", r"matches `attention\.vlaue`\. Did you mean `attention\.value`"),
    ([], r"`where` is empty\. Leave it out"),
    ("re:(", r"is no regular expression"),
    ([3], r"`where` has the entry 3, a int"),
)


@pytest.mark.parametrize("cell", ON_BERT, ids=str)
def test_a_wrong_where_changes_nothing(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    before = trace(backbone)
    for where, message in WRONG:
        with pytest.raises(DeltaError, match=message):
            attach(backbone, cell.recipe, where)
    assert trace(backbone).differences(before) == []
    first = cell.attach(backbone)
    acting = trace(backbone)
    for where, message in WRONG:
        with pytest.raises(DeltaError, match=message):
            attach(backbone, cell.recipe, where)
    assert trace(backbone).differences(acting) == []
    detach(first)
    assert trace(backbone).differences(before) == []
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain(cell.model))


@pytest.mark.parametrize("cell", ON_BERT, ids=str)
def test_wrong_names_and_methods_change_nothing(cell: Cell) -> None:
    backbone, _ = cell.fresh()
    before = trace(backbone)
    for name, message in (("a b", "cannot name a delta. Use letters"), ("", "cannot name a delta"), ("a.b", "cannot name a delta")):
        with pytest.raises(InvalidValue, match=message):
            cell.attach(backbone, name=name)
    with pytest.raises(InvalidValue, match=r"as its method\. Give an instance of a class in deltatune\.methods"):
        attach(backbone, methods[cell.method])  # type: ignore[arg-type]
    with pytest.raises(NoSite, match=r"layers 0 to 1"):
        attach(backbone, cell.recipe, "layer.*", layers=9)
    assert trace(backbone).differences(before) == []
    cell.attach(backbone, name="one")
    with pytest.raises(InvalidValue, match=r"called `one` is attached already\. Choose another name"):
        cell.attach(backbone, name="one")
    cell.attach(backbone, name="two")
    with pytest.raises(UnknownName, match=r"No delta called `tow` is attached to this backbone\. Did you mean `two`"):
        switch(backbone, "tow")
    assert [delta.name for delta in deltas(backbone)] == ["one", "two"]


def test_names_given_by_themselves_are_the_methods() -> None:
    for cell in ON_BERT:
        backbone, _ = cell.fresh()
        names = [cell.attach(backbone).name for _ in range(3)]
        assert names == [cell.method, f"{cell.method}-2", f"{cell.method}-3"]


class Spare(nn.Module):
    """A linear map that its forward never calls, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(HIDDEN, HIDDEN)
        self.spare = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


LINEAR = [
    cell.method for cell in TAKEN if cell.model == "mlp" and acts_of(cell.method) <= {OutputPatch, InputPatch, WeightPatch, SelectionPatch}
]


@pytest.mark.parametrize("method", LINEAR)
def test_a_host_that_never_fires_is_an_error(method: str) -> None:
    backbone = Spare().eval()
    x, before = torch.randn(2, HIDDEN), trace(backbone)
    delta = attach(backbone, small(method), ["used", "spare"])
    if all(isinstance(patch, SelectionPatch) for patch in delta.patches):
        backbone(x)  # what is trained in place needs no hook, and an unused parameter has no gradient
    else:
        for _ in range(2):
            with pytest.raises(Idle, match=r"acts at `spare.*`.*never called th(at module|ose modules): the delta would do nothing"):
                backbone(x)
        delta.disable()
        backbone(x)
        delta.enable()
        with pytest.raises(Idle):
            backbone(x)
    detach(delta)
    assert trace(backbone).differences(before) == []
    backbone(x)


def test_containers_are_no_sites() -> None:
    backbone = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    for method in [name for name in LINEAR if name != "linear-probe"]:  # which trains all parameters below its site
        before = trace(backbone)
        with pytest.raises(DeltaError, match=r"Choose|nothing to do"):
            attach(backbone, small(method), "0")
        assert trace(backbone).differences(before) == []


def test_one_root_at_a_time() -> None:
    backbone, _ = fresh("bert")
    inner = backbone.get_submodule("bert")
    delta = attach(inner, LoRA(rank=2))
    with pytest.raises(Unsupported, match=r"deltas are attached already to a module at `bert` inside it\. Attach all deltas to one"):
        attach(backbone, LoRA(rank=2))
    detach(delta)
    attach(backbone, LoRA(rank=2))
    with pytest.raises(Unsupported, match=r"lies in a BertForSequenceClassification to which deltas are attached already"):
        attach(inner, LoRA(rank=2))
    with pytest.raises(Unsupported, match=r"attached already"):
        attach(inner.get_submodule("encoder.layer.0"), LoRA(rank=2), "attention.self.query")
    assert ledger_of(inner) is None


def test_a_failing_build_leaves_nothing() -> None:
    backbone, inputs = fresh("bert")
    before = trace(backbone)

    def bad(site: Any) -> bool:
        raise RuntimeError("a function of the user's")

    with pytest.raises(RuntimeError, match="of the user's"):
        attach(backbone, LoRA(rank=2), bad)
    with pytest.raises(InvalidValue, match=r"LoRA\(rank=0\) was asked for; `rank` must be greater than 0"):
        attach(backbone, LoRA(rank=0))
    assert trace(backbone).differences(before) == []
    assert output(backbone, inputs).isfinite().all()
