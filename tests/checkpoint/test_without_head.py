"""A delta taken along to another task: everything but the head it was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.errors import InvalidValue
from deltatune.methods import LinearProbe
from tests.checkpoint.deltas import backbone, same, small, state, trained
from tests.conformance.cells import shake
from tests.models import output


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_the_backbones_own_head_stays(method: str, tmp_path: Path) -> None:
    first, _ = backbone("bert", head=1)
    delta = trained(first, method)
    dt.save(delta, tmp_path / "a")
    own = {name: tensor for name, tensor in delta.state_dict().items() if not name.startswith("classifier.")}
    second, _ = backbone("bert", head=2)
    head = {name: tensor.clone() for name, tensor in second.classifier.state_dict().items()}
    before = state(second)
    loaded = dt.load(second, tmp_path / "a", head=False)
    assert isinstance(loaded, dt.Delta)
    assert same(loaded.state_dict(), own)
    assert same(second.classifier.state_dict(), head)
    probe = dt.attach(second, LinearProbe(), name="head")
    assert all(parameter.requires_grad for parameter in second.classifier.parameters())
    dt.detach(probe)
    dt.detach(loaded)
    assert same(state(second), before)


def test_another_number_of_labels(tmp_path: Path) -> None:
    first, _ = backbone("bert")
    dt.save(trained(first), tmp_path / "a")
    second, inputs = backbone("bert")
    second.classifier = torch.nn.Linear(second.config.hidden_size, 7)
    dt.load(second, tmp_path / "a", head=False)
    assert second(**inputs).logits.shape[-1] == 7


def test_nothing_but_a_head(tmp_path: Path) -> None:
    first, _ = backbone("bert")
    dt.save(trained(first, "linear-probe"), tmp_path / "a")
    with pytest.raises(InvalidValue, match="`d` is a task head and nothing else"):
        dt.load(backbone("bert")[0], tmp_path / "a", head=False)


def test_a_composition_with_a_member_that_is_only_a_head(tmp_path: Path) -> None:
    """As of a fusion: the target's head is a member of its own."""
    first, inputs = backbone("bert", head=1)
    members = [dt.attach(first, small("adapter"), name=name, head=False) for name in ("a", "b")]
    for seed, member in enumerate(members):
        shake(member, seed=seed)
    shake(head := dt.attach(first, LinearProbe(), name="head"))
    composition = dt.compose(first, [*members, head], how="weighted", weights=[0.7, 0.3, 1.0], name="all")
    dt.save(composition, tmp_path / "all")
    second, _ = backbone("bert", head=2)
    own = {name: tensor.clone() for name, tensor in second.classifier.state_dict().items()}
    loaded = dt.load(second, tmp_path / "all", head=False)
    assert isinstance(loaded, dt.Composition)
    assert (loaded.members, loaded.weights) == (("a", "b"), (0.7, 0.3))
    assert same(second.classifier.state_dict(), own)
    with torch.no_grad():
        assert not torch.equal(output(second, inputs), output(backbone("bert", head=2)[0], inputs))
