"""Deltas of every kind in one composition: composed, saved, loaded, dissolved and detached in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.injection.compose import Composition
from deltatune.methods.kinds import OutputPatch, PrefixPatch, PromptPatch, SelectionPatch, WeightPatch
from tests.checkpoint.deltas import backbone, same, small, state, train
from tests.models import output

MODELS = ("bert", "llama", "t5")
KINDS: dict[str, tuple[str, Any, type[nn.Module]]] = {
    "adapters": ("adapter", None, OutputPatch),
    "low_rank": ("lora", ["attention.query", "feed_forward.down"], OutputPatch),
    "sparse": ("diff-pruning", "feed_forward.up", WeightPatch),
    "prefixes": ("prefix-tuning", None, PrefixPatch),
    "prompts": ("prompt-tuning", None, PromptPatch),
    "norms": ("full", "norm", SelectionPatch),
}
"""Name -> method, where, and how it acts."""

WEIGHTS = (0.5, -0.25, 1.5, 1.0, 1.0, 0.75)
BY_TOKEN = ("adapters", "low_rank", "prefixes", "prompts")


def attached(name: str, order: Sequence[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A backbone with trained deltas, attached in this order."""
    model, inputs = backbone(name)
    for member in order:
        method, where, kind = KINDS[member]
        torch.manual_seed(sorted(KINDS).index(member))
        delta = train(dt.attach(model, small(method), where, name=member, head=False), seed=len(member))
        assert all(isinstance(patch, kind) for patch in delta.patches)
    return model, inputs


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(list(names), len(names))


def found(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return output(model, inputs)


@pytest.mark.parametrize("how", ["sequential", "parallel", "weighted", "gated", "fusion"])
@pytest.mark.parametrize("name", MODELS)
def test_one_artefact(name: str, how: Any, tmp_path: Path) -> None:
    members = shuffled(BY_TOKEN if how in ("gated", "fusion") else tuple(KINDS), seed=3)
    first, inputs = attached(name, members)
    composition = dt.compose(first, members, how, weights=WEIGHTS if how == "weighted" else None, name="all")
    with torch.no_grad():
        for k, tensor in enumerate(composition.mixing.state_dict().values()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)))
    expected = found(first, inputs)
    dt.save(composition, tmp_path / "a", unfinished=True)
    second, _ = backbone(name)
    before, plain = state(second), found(second, inputs)
    loaded = dt.load(second, tmp_path / "a", name="again")
    assert isinstance(loaded, Composition) and loaded.members == composition.members
    assert [delta.method for delta in loaded.deltas] == [delta.method for delta in composition.deltas]
    torch.testing.assert_close(found(second, inputs), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)
    loaded.disable()
    assert torch.equal(found(second, inputs), plain)
    loaded.enable()
    torch.testing.assert_close(found(second, inputs), expected, atol=1e-6, rtol=1e-5)
    loaded.dissolve()
    for delta in random.Random(5).sample(dt.deltas(second), len(members)):
        dt.detach(delta)
    assert same(state(second), before)
    assert torch.equal(found(second, inputs), plain)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_attaching_does_not_matter(name: str, seed: int) -> None:
    """What counts is the order in the composition, whatever was composed, dissolved or switched before."""
    first, inputs = attached(name, tuple(KINDS))
    dt.compose(first, tuple(KINDS), "parallel")
    expected = found(first, inputs)
    second, _ = attached(name, shuffled(tuple(KINDS), seed))
    pair = dt.compose(second, shuffled(tuple(KINDS), seed + 10)[:2])
    dt.switch(second, pair.name)
    pair.dissolve()
    whole = dt.compose(second, tuple(KINDS), "parallel")
    torch.testing.assert_close(found(second, inputs), expected, atol=1e-6, rtol=1e-5)
    whole.dissolve()
    again = dt.compose(second, tuple(KINDS), "parallel")
    torch.testing.assert_close(found(second, inputs), expected, atol=1e-6, rtol=1e-5)
    again.disable()
    with dt.disabled(second):
        plain = found(second, inputs)
    assert torch.equal(found(second, inputs), plain)
