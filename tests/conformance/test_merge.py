"""Rule 6: a merge computes the same, and unmerging restores the exact bits in any order."""

from __future__ import annotations

import pytest
import torch

from deltatune.errors import Unsupported
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import CHILD
from deltatune.injection.switching import deltas
from deltatune.methods.kinds import Commuting, SelectionPatch
from tests.conformance.cells import KEPT_APART, MERGING, Cell, moved, over, shake
from tests.conformance.trace import trace
from tests.models import output

TOLERANCE = 2e-5


@over(MERGING)
@torch.no_grad()
def test_merged_computes_the_same(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    expected, before = output(backbone, inputs), trace(backbone)
    bits = {name: tensor.detach().clone() for name, tensor in backbone.named_parameters()}
    kept = merge(delta)
    assert delta.merged
    assert not any(parameter.requires_grad for parameter in delta.parameters())
    assert moved(output(backbone, inputs), expected) < TOLERANCE
    written = [name for name, tensor in backbone.named_parameters() if not torch.equal(tensor, bits[name])]
    assert kept == sum(bits[name].numel() * bits[name].element_size() for name in written)
    with pytest.raises(Unsupported, match=r"is merged already\. Unmerge it"):
        merge(delta)
    with pytest.raises(Unsupported, match=r"while it is merged into the weights\. Call"):
        delta.disable()
    unmerge(delta)
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), expected)
    with pytest.raises(Unsupported, match=r"is not merged\. Merge it first"):
        unmerge(delta)


@pytest.mark.parametrize("first", [0, 1], ids=["oldest-first", "newest-first"])
@over(MERGING)
@torch.no_grad()
def test_two_merged_deltas_unmerge_in_any_order(cell: Cell, first: int) -> None:
    backbone, inputs = cell.fresh()
    pair = [cell.attach(backbone, name=name) for name in ("a", "b")]
    for k, delta in enumerate(pair):
        shake(delta, seed=k)
    expected, before = output(backbone, inputs), trace(backbone)
    for delta in pair:
        merge(delta)
    assert moved(output(backbone, inputs), expected) < TOLERANCE
    if first == 0 and not all(isinstance(patch, Commuting | SelectionPatch) for patch in pair[0].patches):
        with pytest.raises(Unsupported, match=r"do not commute\. Unmerge in the reverse order"):
            unmerge(pair[0])
        return
    unmerge(pair[first])
    assert moved(output(backbone, inputs), expected) < TOLERANCE
    unmerge(pair[1 - first])
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), expected)


@over(MERGING)
@torch.no_grad()
def test_merged_for_good(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    names = list(backbone.state_dict())
    delta = cell.attach(backbone)
    shake(delta)
    expected = output(backbone, inputs)
    assert merge(delta, keep=True) == 0
    assert deltas(backbone) == []
    assert list(backbone.state_dict()) == names
    assert not any(CHILD in path.split(".") for path, _ in backbone.named_modules())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert moved(output(backbone, inputs), expected) < TOLERANCE


@over(KEPT_APART)
@torch.no_grad()
def test_what_is_no_weight_says_so(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    expected, before = output(backbone, inputs), trace(backbone)
    with pytest.raises(Unsupported, match=r"cannot be merged.*(Keep it attached|tied to other modules)"):
        merge(delta)
    assert not delta.merged
    assert trace(backbone).differences(before) == []
    assert torch.equal(output(backbone, inputs), expected)
