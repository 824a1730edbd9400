"""What attach takes and refuses: idle sites, backbones within backbones, and backbones that have no memory yet."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import CheckpointError, Idle, InvalidValue, NoSite, Unsupported
from deltatune.methods import IA3, Adapter, BitFit, DiffPruning, LoRA, PrefixTuning
from deltatune.methods.kinds import Method
from deltatune.training.life import Life
from tests.conformance.cells import shake
from tests.conformance.trace import trace
from tests.models import MODELS, output


class Spare(nn.Module):
    """Two linear maps, of which one is only called when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        x = self.used(x)
        return self.spare(x) if both else x  # type: ignore[no-any-return]


def test_idle_sites_are_taken_where_that_is_allowed(tmp_path: Path) -> None:
    backbone, x = Spare(), torch.randn(2, 4)
    with pytest.raises(Idle, match=r"acts at `spare`.*attach it with allow_idle=True"):
        dt.attach(backbone, LoRA(rank=1), where=["used", "spare"], name="strict")
        backbone(x)
    dt.detach(dt.deltas(backbone)[0])
    delta = dt.attach(backbone, LoRA(rank=1), where=["used", "spare"], name="lenient", allow_idle=True)
    plain = backbone(x, both=True)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.fill_(1.0)
    assert backbone(x).isfinite().all()
    assert not torch.equal(backbone(x, both=True), plain)
    dt.save(delta, tmp_path / "lenient")
    dt.detach(delta)
    dt.load(backbone, tmp_path / "lenient")
    with pytest.raises(Idle):
        backbone(x)
    dt.detach(dt.deltas(backbone)[0])
    dt.load(backbone, tmp_path / "lenient", allow_idle=True)
    assert backbone(x).isfinite().all()


def test_a_module_inside_a_backbone_with_deltas_is_no_backbone_of_its_own() -> None:
    backbone, inputs = MODELS["bert"]()
    delta = dt.attach(backbone, LoRA(rank=2), where="bert.encoder.layer.0.attention.self.query", head=False)
    copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))]
    for outer in (backbone, *copies):
        before = trace(outer)
        for inner in (outer.bert, outer.bert.encoder.layer[1]):
            with pytest.raises(Unsupported, match="lies in a BertForSequenceClassification to which deltas are attached already"):
                dt.attach(inner, LoRA(rank=2))
        assert trace(outer).differences(before) == []
    dt.detach(delta)
    dt.attach(backbone.bert, LoRA(rank=2))
    with pytest.raises(Unsupported, match=r"attached already to a module at `bert` inside it"):
        dt.attach(backbone, LoRA(rank=2))
    output(backbone, inputs)


METHODS = (LoRA(rank=2), Adapter(bottleneck_dim=4), IA3(), DiffPruning(), PrefixTuning(num_virtual_tokens=2))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_delta_on_the_meta_device_starts_over_once_there_is_memory(method: Method, tmp_path: Path) -> None:
    backbone, inputs = MODELS["bert"]()
    weights = backbone.state_dict()
    torch.manual_seed(1)
    saved = dt.attach(copy.deepcopy(backbone), method, name="one", head=False)
    dt.save(saved, tmp_path / "one", unfinished=True)
    hollow = copy.deepcopy(backbone).to("meta")
    with pytest.raises(Unsupported, match=r"on the meta device.*to_empty\(device=\.\.\.\)"):
        dt.load(hollow, tmp_path / "one", allow_foreign=True)
    assert dt.deltas(hollow) == []
    delta = dt.attach(hollow, method, name="one", head=False)
    with pytest.raises(Unsupported, match=r"on the meta device"):
        dt.reset(delta)
    hollow.to_empty(device="cpu")
    for tensor in hollow.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    hollow.load_state_dict(weights, strict=False)
    for name, buffer in backbone.named_buffers():
        hollow.get_buffer(name).copy_(buffer)
    torch.manual_seed(1)
    dt.reset(delta)
    expected, found = saved.state_dict(), delta.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert torch.equal(output(hollow.eval(), inputs), output(saved.backbone.eval(), inputs))


def test_what_trained_in_place_starts_over_from_the_backbones_own_values() -> None:
    backbone, inputs = MODELS["bert"]()
    plain = output(backbone.eval(), inputs)
    delta = dt.attach(backbone, BitFit())
    parameters = dict(delta.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    assert not torch.equal(output(backbone, inputs), plain)
    dt.reset(delta)
    assert torch.equal(output(backbone, inputs), plain)
    assert all(parameters[name] is parameter for name, parameter in delta.named_parameters())


def test_several_methods_become_one_composition(tmp_path: Path) -> None:
    backbone, inputs = MODELS["bert"]()
    before, plain = trace(backbone), output(backbone.eval(), inputs)
    both = dt.attach(backbone, [LoRA(rank=2), Adapter(bottleneck_dim=4)], layers=0, name="both")
    assert isinstance(both, dt.Composition)
    assert (both.name, both.how, both.members) == ("both", "sequential", ("lora", "adapter"))
    lora, adapter = both.deltas
    assert [any(entry.head for entry in delta.entries) for delta in (lora, adapter)] == [True, False]
    assert {name.split(".")[0] for name, _ in both.named_parameters()} == {"lora", "adapter"}
    assert sum(1 for _ in both.parameters()) == sum(1 for delta in both.deltas for _ in delta.parameters())
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.add_(0.1)
        acting = output(backbone, inputs)
        both.disable()
        assert torch.equal(output(backbone, inputs), plain)
        both.enable()
        assert torch.equal(output(backbone, inputs), acting)
        dt.save(both, tmp_path / "both")
        dt.detach(both)
        assert trace(backbone).differences(before) == []
        assert torch.equal(output(backbone, inputs), plain)
        dt.load(backbone, tmp_path / "both")
        assert torch.equal(output(backbone, inputs), acting)


def test_several_methods_are_attached_all_or_none() -> None:
    backbone, _ = MODELS["bert"]()
    before = trace(backbone)
    with pytest.raises(NoSite):
        dt.attach(backbone, [LoRA(rank=2), Adapter(bottleneck_dim=4)], where="pooler")
    with pytest.raises(InvalidValue, match="cannot name a delta"):
        dt.attach(backbone, [LoRA(rank=2), BitFit()], name="a b")
    with pytest.raises(InvalidValue, match=r"was given \[\] as its method"):
        dt.attach(backbone, [])
    assert trace(backbone).differences(before) == []
    one = dt.attach(backbone, [LoRA(rank=2)], name="one")
    assert isinstance(one, dt.Delta) and one.name == "one"


def test_a_composition_is_trained_and_taken_over_like_a_delta() -> None:
    backbone, inputs = MODELS["bert"]()
    both = dt.attach(backbone.eval(), [LoRA(rank=2), DiffPruning()], layers=0, name="both")
    lora, sparse = both.deltas
    groups = both.parameter_groups(lr=0.1)
    assert [group["lr"] for group in groups] == [group["lr"] for delta in both.deltas for group in delta.parameter_groups(lr=0.1)]
    trained = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in both.parameters() if parameter.requires_grad}
    assert len(trained) == len({id(parameter) for parameter in trained})
    assert both.budget().delta == lora.budget().delta + sparse.budget().delta
    assert both.penalty().item() == sparse.penalty().item() > 0
    life = Life(both, total=4)
    assert life.deltas == [lora, sparse]
    lora.freeze()
    assert Life(both, total=4).deltas == [sparse]
    assert both.parameter_groups(lr=0.1) == sparse.parameter_groups(lr=0.1)
    shake(lora)
    acting, state = output(backbone, inputs), {name: tensor.clone() for name, tensor in both.state_dict().items()}
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.add_(0.1)
    assert not torch.equal(output(backbone, inputs), acting)
    both.load_state_dict(state)
    assert torch.equal(output(backbone, inputs), acting)
    with pytest.raises(CheckpointError, match=r"`other\.A` fits no member of composition `both`: lora, diff-pruning"):
        both.load_state_dict({**state, "other.A": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="missing"):
        both.load_state_dict({})
