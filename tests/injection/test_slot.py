"""The slot: one child with two hooks on a site, whatever sits in it and whatever it does."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.slot import CHILD, Slot, slot_of
from deltatune.injection.switching import disabled, switch
from deltatune.methods import IA3, BitFit, DiffPruning, FullFineTuning, LoRA
from tests.conformance.cells import TAKEN, fresh
from tests.models import output


def _hooks(module: nn.Module) -> tuple[list[int], list[int]]:
    return list(module._forward_pre_hooks), list(module._forward_hooks)


def test_hooks_come_with_the_first_patch_and_go_with_the_last() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    site = backbone[0]
    a = attach(backbone, LoRA(rank=2), "0", name="a")
    hooks = _hooks(site)
    slot = slot_of(site)
    assert [len(kind) for kind in hooks] == [1, 1]
    assert isinstance(slot, Slot)
    assert site._modules[CHILD] is slot
    b = attach(backbone, DiffPruning(), "0", name="b")
    c = attach(backbone, IA3(), "0", name="c")
    for act in (a.disable, a.enable, lambda: switch(backbone, "c"), lambda: switch(backbone, "a"), lambda: merge(a), lambda: unmerge(a)):
        act()
        assert _hooks(site) == hooks
        assert slot_of(site) is slot
    composition = compose(backbone, ["a", "b"], "weighted", weights=[1.0, 2.0])
    assert _hooks(site) == hooks
    composition.dissolve()
    with disabled(backbone):
        assert _hooks(site) == hooks
    detach(a)
    detach(b)
    assert _hooks(site) == hooks
    detach(c)
    assert _hooks(site) == ([], [])
    assert slot_of(site) is None


def test_what_trains_in_place_needs_no_hook() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    attach(backbone, FullFineTuning())
    assert _hooks(backbone[0]) == ([], [])
    assert slot_of(backbone[0]) is not None
    lora = attach(backbone, LoRA(rank=2), "0")
    assert [len(kind) for kind in _hooks(backbone[0])] == [1, 1]
    detach(lora)


@pytest.mark.parametrize("cell", [cell for cell in TAKEN if cell.model in ("bert", "t5", "conv_net", "torch_encoder")], ids=str)
def test_patches_hold_bare_parameters(cell: object) -> None:
    """Quantisers and init walks take an ``nn.Linear`` of ours for the model's."""
    backbone, _ = cell.fresh()  # type: ignore[attr-defined]
    delta = cell.attach(backbone)  # type: ignore[attr-defined]
    modules = [module for part in (*delta.patches, delta.shared) if part is not None for module in part.modules()]
    assert modules
    bare = ("torch.nn.modules.module", "torch.nn.modules.container")  # lists and dictionaries of ours hold no tensors
    assert not [
        type(module)
        for module in modules
        if type(module).__module__.startswith("torch.nn.modules.") and type(module).__module__ not in bare
    ]


@pytest.mark.parametrize("method", [LoRA(rank=2), BitFit(), DiffPruning()])
def test_an_initialising_walk_leaves_deltas_alone(method: LoRA | BitFit | DiffPruning) -> None:
    backbone, inputs = fresh("llama")
    delta = attach(backbone, method)
    before = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    backbone.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    added = [name for name in before if delta.state_dict()[name].shape == before[name].shape]
    assert added
    assert all(torch.equal(delta.state_dict()[name], before[name]) for name in added)
    assert output(backbone, inputs).isfinite().all()


def test_a_root_that_is_a_site_keeps_its_slot_in_the_ledger() -> None:
    torch.manual_seed(0)
    backbone = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    plain = backbone(x)
    delta = attach(backbone, LoRA(rank=2), "*")
    slot = slot_of(backbone)
    assert isinstance(slot, Slot)
    assert list(backbone._modules) == [CHILD]
    assert torch.equal(backbone(x), plain)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.fill_(0.5)
    assert not torch.equal(backbone(x), plain)
    copy = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(copy(x), backbone(x))
    detach(delta)
    assert torch.equal(backbone(x), plain)
    assert not backbone._modules


def test_containers_that_walk_their_children_pass_through() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), inner=nn.Sequential(nn.Linear(4, 4), nn.Tanh()), b=nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    plain = backbone(x)
    delta = attach(backbone, LoRA(rank=2), ["a", "inner.0", "b"])
    assert torch.equal(backbone(x), plain)
    detach(delta)
    assert [name for name, _ in backbone.named_children()] == ["a", "inner", "b"]


def test_hooks_of_the_users_own_stay() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    seen: list[Tensor] = []
    backbone[0].register_forward_hook(lambda _, args, y: seen.append(y))
    delta = attach(backbone, LoRA(rank=2), "0")
    later = backbone[0].register_forward_hook(lambda _, args, y: y + 1)
    x = torch.randn(2, 4)
    found = backbone(x)
    assert torch.equal(found, seen[0] + 1)
    detach(delta)
    assert torch.equal(backbone(x), found)
    assert len(backbone[0]._forward_hooks) == 2
    later.remove()


def test_training_mode_reaches_patches() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4)).eval()
    delta = attach(backbone, LoRA(rank=2, dropout=0.5), "0")
    assert not any(patch.training for patch in delta.patches)
    backbone.train()
    assert all(patch.training for patch in delta.patches)
    second = attach(backbone, LoRA(rank=2), "0")
    assert all(patch.training for patch in second.patches)


class Mixed(nn.Module):
    """x W, whatever the order in which the arguments come."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.in_features = self.out_features = 4

    def forward(self, x: Tensor | None = None, x_embeds: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = x_embeds if x is None else x
        assert x is not None
        return x @ self.weight if shift is None else x @ self.weight + shift


class Calls(nn.Module):
    """Calls its inner module in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mixed()

    def forward(self, x: Tensor, how: str) -> Tensor:
        shift = torch.full((4,), 100.0)
        if how == "keywords":
            return self.inner(shift=shift, x=x)  # type: ignore[no-any-return]
        return self.inner(None, shift=shift, x_embeds=x) if how == "none first" else self.inner(x, None, shift)  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_input_is_found_by_the_forwards_signature(compiled: bool) -> None:
    backbone, x = Calls(), torch.randn(3, 4)
    lora = attach(backbone, LoRA(rank=2), "inner")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    run = torch.compile(backbone, backend="eager", fullgraph=True) if compiled else backbone
    expected = backbone(x, "positions")
    assert not torch.equal(expected, x + 100)
    for how in ("keywords", "none first"):
        torch.testing.assert_close(run(x, how), expected)
