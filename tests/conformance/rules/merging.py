"""Rule 6: a merge computes the same, and unmerging restores the exact bits in any order."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.errors import Unsupported
from deltatune.injection.slot import CHILD
from deltatune.methods.kinds import Commuting, SelectionPatch
from tests.conformance.cells import moved
from tests.conformance.sitting import Sitting
from tests.conformance.trace import trace
from tests.models import output

TOLERANCE = 2e-5


@torch.no_grad()
def merged_computes_the_same(sitting: Sitting) -> None:
    """``merge`` says how many bytes it keeps, and ``unmerge`` leaves no trace of it."""
    delta, backbone = sitting.trained(), sitting.backbone
    before = trace(backbone)
    bits = {name: tensor.detach().clone() for name, tensor in backbone.named_parameters()}
    kept = dt.merge(delta)
    assert delta.merged
    assert not any(parameter.requires_grad for parameter in delta.parameters())
    assert moved(sitting.output(), sitting.acting) < TOLERANCE
    written = [name for name, tensor in backbone.named_parameters() if not torch.equal(tensor, bits[name])]
    assert kept == sum(bits[name].numel() * bits[name].element_size() for name in written)
    with pytest.raises(Unsupported, match=r"is merged already\. Unmerge it"):
        dt.merge(delta)
    with pytest.raises(Unsupported, match=r"while it is merged into the weights\. Call"):
        delta.disable()
    dt.unmerge(delta)
    assert sitting.changes(before) == []
    assert torch.equal(sitting.output(), sitting.acting)
    with pytest.raises(Unsupported, match=r"is not merged\. Merge it first"):
        dt.unmerge(delta)


@torch.no_grad()
def two_merged_deltas_unmerge_in_any_order(sitting: Sitting) -> None:
    """Newest first always; oldest first where the two commute, else that is refused."""
    first = sitting.trained()
    second = sitting.second()
    expected, before = sitting.output(), trace(sitting.backbone)
    dt.merge(first)
    dt.merge(second)
    assert moved(sitting.output(), expected) < TOLERANCE
    dt.unmerge(second)
    assert moved(sitting.output(), expected) < TOLERANCE
    dt.merge(second)
    if all(isinstance(patch, Commuting | SelectionPatch) for patch in first.patches):
        dt.unmerge(first)
        assert moved(sitting.output(), expected) < TOLERANCE
        dt.unmerge(second)
    else:
        with pytest.raises(Unsupported, match=r"do not commute\. Unmerge in the reverse order"):
            dt.unmerge(first)
        dt.unmerge(second)
        dt.unmerge(first)
    assert sitting.changes(before) == []
    assert torch.equal(sitting.output(), expected)
    dt.detach(second)
    assert torch.equal(sitting.output(), sitting.acting)


@torch.no_grad()
def merged_for_good(sitting: Sitting) -> None:
    """``merge(delta, keep=True)``, on a copy: the delta is gone, its change stays."""
    sitting.trained()
    backbone, delta = sitting.copy()
    assert dt.merge(delta, keep=True) == 0
    assert dt.deltas(backbone) == []
    assert list(backbone.state_dict()) == [name for name in sitting.before.tensors if not name.startswith("buffer ")]
    assert not any(CHILD in path.split(".") for path, _ in backbone.named_modules())
    flags = {name: flag for name, _, flag in sitting.before.parameters}
    assert {name: tensor.requires_grad for name, tensor in backbone.named_parameters(remove_duplicate=False)} == flags
    assert moved(output(backbone, sitting.inputs), sitting.acting) < TOLERANCE


def what_is_no_weight_says_so(sitting: Sitting) -> None:
    """Merging is refused, and nothing is changed."""
    delta, before = sitting.trained(), trace(sitting.backbone)
    with pytest.raises(Unsupported, match=r"cannot be merged.*(Keep it attached|tied to other modules)"):
        dt.merge(delta)
    assert not delta.merged
    assert sitting.changes(before) == []
    assert torch.equal(sitting.output(), sitting.acting)
