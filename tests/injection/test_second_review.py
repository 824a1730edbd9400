"""What a second review of the kernel broke: replaced modules, frozen selections, loaded weights, borrowed values, parametrizations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods import MAM, BitFit, DoRA, LastLayers, LoRA, NormTuning, UniPELT
from deltatune.methods.composed import Composed, Part
from deltatune.methods.kinds import Family, Kind, Method
from tests.conformance.cells import fresh, shake, small
from tests.models import mlp, output


def test_a_head_that_was_replaced_between_two_attaches() -> None:
    backbone, inputs = fresh("bert")
    dt.attach(backbone, LoRA(rank=2), name="a")
    backbone.classifier = nn.Linear(32, 5)
    second = dt.attach(backbone, LoRA(rank=2), name="b")
    trained = {id(parameter) for parameter in second.parameters()}
    assert {id(parameter) for parameter in backbone.classifier.parameters()} <= trained
    assert backbone.classifier.weight.requires_grad
    output(backbone, inputs).sum().backward()
    assert backbone.classifier.weight.grad is not None


def test_a_load_finds_a_head_that_was_replaced(tmp_path: Any) -> None:
    backbone, inputs = fresh("bert")
    saved = dt.attach(backbone, LoRA(rank=2), name="saved")
    shake(saved)
    with torch.no_grad():
        expected = output(backbone, inputs)
    dt.save(saved, tmp_path / "d")
    other, _ = fresh("bert")
    dt.attach(other, LoRA(rank=2), name="a").disable()
    other.classifier = nn.Linear(other.classifier.in_features, other.classifier.out_features)
    dt.load(other, tmp_path / "d")
    with torch.no_grad():
        assert torch.equal(output(other, inputs), expected)


def test_a_frozen_selection_in_front_lets_the_other_train() -> None:
    backbone, inputs = fresh("bert")
    first = dt.attach(backbone, LastLayers(), name="first", head=False)
    second = dt.attach(backbone, BitFit(), name="second", head=False)
    shake(first)
    shake(second, seed=1)
    with torch.no_grad():
        before = output(backbone, inputs)
    values = {delta.name: {name: tensor.clone() for name, tensor in delta.state_dict().items()} for delta in (first, second)}
    second.freeze()
    assert all(parameter.requires_grad for parameter in first.trained_parameters().values())
    torch.testing.assert_close(output(backbone, inputs).detach(), before, rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(first.parameter_groups(0.1), lr=0.1)
    output(backbone, inputs).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, values["first"][name])}
    assert {name for name in first.trained_parameters() if not name.endswith("key.bias")} <= moved  # that one changes nothing
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, values["second"][name], rtol=0, atol=1e-6)
    second.unfreeze()
    shared = {id(parameter) for parameter in first.parameters()} & {id(parameter) for parameter in second.parameters()}
    assert shared
    dt.detach(first)
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, values["second"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("again", ["unmerge", "detach", "merge"])
def test_weights_that_were_loaded_while_merged_are_not_overwritten(again: str) -> None:
    backbone, _ = mlp()
    where = [site.key for site in dt.find_sites(backbone, "*") if isinstance(site.module, nn.Linear)]
    delta, other = dt.attach(backbone, LoRA(rank=2), where, name="a"), dt.attach(backbone, LoRA(rank=2), where, name="b")
    for each in (delta, other):
        shake(each)
    plain = {name: tensor.clone() for name, tensor in dt.backbone_state(backbone).items()}
    dt.merge(delta)
    loaded = {name: torch.randn_like(tensor) for name, tensor in plain.items()}
    backbone.load_state_dict(loaded, strict=False)
    with pytest.raises(Unsupported, match=r"was written since a delta was merged.*discard=True"):
        {"unmerge": lambda: dt.unmerge(delta), "detach": lambda: dt.detach(delta), "merge": lambda: dt.merge(other)}[again]()
    assert all(torch.equal(backbone.state_dict()[name], tensor) for name, tensor in loaded.items())
    dt.unmerge(delta, discard=True)
    dt.detach(delta)
    dt.detach(other)
    merged = {f"{key}.weight" for key in where}
    assert all(torch.equal(backbone.state_dict()[name], (plain if name in merged else loaded)[name]) for name in plain)


def test_a_merge_that_moved_is_no_writing() -> None:
    backbone, _ = mlp()
    where = [site.key for site in dt.find_sites(backbone, "*") if isinstance(site.module, nn.Linear)]
    delta = dt.attach(backbone, LoRA(rank=2), where)
    shake(delta)
    dt.merge(delta)
    backbone.to(torch.float64)
    dt.attach(backbone, DoRA(rank=2), where, name="reads")  # reads the originals, and puts the merged weights back
    dt.detach(dt.deltas(backbone)[-1])
    dt.unmerge(delta)


@pytest.mark.parametrize("method", [LoRA(rank=2), NormTuning(), BitFit()], ids=str)
def test_the_plain_backbone_between_a_forward_and_its_backward(method: Method) -> None:
    """A loss that compares the two, as of distillation or preference learning."""
    backbone, inputs = fresh("bert")
    delta = dt.attach(backbone, method)
    shake(delta)
    found = output(backbone, inputs)
    found.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in delta.trained_parameters().items() if parameter.grad is not None}
    backbone.zero_grad()
    found = output(backbone, inputs)
    with dt.disabled(backbone), torch.no_grad():
        output(backbone, inputs)
    found.square().mean().backward()
    assert expected
    for name, gradient in expected.items():
        assert torch.equal(delta.trained_parameters()[name].grad, gradient), name  # type: ignore[arg-type]


def test_a_backward_while_it_is_disabled_is_refused() -> None:
    backbone, inputs = fresh("bert")
    delta = dt.attach(backbone, NormTuning())
    shake(delta)
    found = output(backbone, inputs)
    with dt.disabled(backbone), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.square().mean().backward()


def test_what_is_written_meanwhile_stays_known_as_written() -> None:
    backbone, inputs = fresh("bert")
    delta = dt.attach(backbone, NormTuning())
    shake(delta)
    found = output(backbone, inputs)
    with dt.disabled(backbone), torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.square().mean().backward()


def test_switching_to_a_member_changes_nothing() -> None:
    backbone, _ = fresh("bert")
    deltas = [dt.attach(backbone, LoRA(rank=2), name=name, head=False) for name in "abd"]
    composition = dt.compose(backbone, deltas[:2], name="c")
    before = list(composition.ledger.terms)
    with pytest.raises(Unsupported, match="acts within the composition `c`"):
        dt.switch(backbone, "a")
    assert composition.ledger.terms == before
    assert deltas[2].enabled


def test_training_switches_twelve_deltas_with_one_graph() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).train()
    names = [f"d{k}" for k in range(12)]
    for name in names:
        dt.attach(backbone, LoRA(rank=2), where=["0", "1"], name=name).disable()
    graphs = 0

    def count(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    x = torch.randn(3, 4)
    dt.switch(backbone, names[0])
    compiled = torch.compile(backbone, backend=count, fullgraph=True)
    for name in names:
        dt.switch(backbone, name)
        torch.testing.assert_close(compiled(x), backbone(x))
    assert graphs <= 2


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=str)
def test_a_parametrized_weight(method: Method) -> None:
    backbone = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    if isinstance(method, DoRA):
        with pytest.raises(Unsupported, match="weight_norm"):
            dt.attach(backbone, method, where="0")
        return
    delta = dt.attach(backbone, method, where="0")
    shake(delta)
    before = backbone(x)
    with pytest.raises(Unsupported, match="parametrization"):
        dt.merge(delta)
    assert torch.equal(backbone(x), before)


@dataclass(frozen=True)
class Twice(Composed):
    """Two LoRAs at every query."""

    family: ClassVar[Family] = "reparameterization"
    kind: ClassVar[Kind] = "output"
    where: ClassVar[tuple[str, ...]] = ("attention.query",)

    @property
    def parts(self) -> Sequence[Part]:  # type: ignore[override]
        return (Part(LoRA(rank=2)), Part(LoRA(rank=3)))


def test_two_patches_at_one_site_have_names_of_their_own() -> None:
    backbone, inputs = fresh("bert")
    delta = dt.attach(backbone, Twice(), head=False)
    shake(delta)
    size = sum(parameter.numel() for parameter in delta.parameters())
    assert size == sum(tensor.numel() for tensor in delta.state_dict().values()) == delta.budget().delta
    state = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    with torch.no_grad():
        expected = output(backbone, inputs)
    dt.detach(delta)
    again = dt.attach(backbone, Twice(), head=False)
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)


@pytest.mark.parametrize("name", ["mam", "unipelt"])
def test_a_state_that_does_not_fit_leaves_a_recipe_of_parts_as_it_was(name: str) -> None:
    backbone, inputs = fresh("bert")
    delta = dt.attach(backbone, small(name))
    assert isinstance(delta.method, MAM | UniPELT)
    shake(delta)
    with torch.no_grad():
        expected = output(backbone, inputs)
    exported, _ = fresh("bert")
    other = dt.attach(exported, small(name))
    other.method.export(other.patches, other.shared)  # type: ignore[attr-defined]
    wrong = dict(other.state_dict())
    wrong.pop(next(key for key in wrong if "classifier" in key))
    objects = [id(parameter) for parameter in delta.parameters()]
    with pytest.raises(dt.errors.CheckpointError):
        delta.load_state_dict(wrong)
    assert [id(parameter) for parameter in delta.parameters()] == objects
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda backbone, delta, pair: dt.merge(pair), "merge was given Composition"),
        (lambda backbone, delta, pair: dt.unmerge(backbone), "unmerge was given"),
        (lambda backbone, delta, pair: dt.merge("a"), "merge was given 'a'"),
        (lambda backbone, delta, pair: dt.detach(backbone), "detach was given"),
        (lambda backbone, delta, pair: dt.compose(backbone, [pair, "a"]), "compose was given Composition"),
        (lambda backbone, delta, pair: dt.attach("bert-base", LoRA()), "attach was given 'bert-base'"),
        (lambda backbone, delta, pair: dt.attach(backbone, LoRA(rank=2.5)), r"LoRA\(rank=2.5\).*whole number"),  # type: ignore[arg-type]
        (lambda backbone, delta, pair: LoRA(rank="8"), r"LoRA\(rank='8'\).*a number"),  # type: ignore[arg-type]
        (lambda backbone, delta, pair: dt.attach(backbone, LoRA(), name="mixer"), "`mixer` cannot name a delta"),
    ],
)
def test_verbs_say_what_they_were_given(call: Any, words: str) -> None:
    backbone, _ = fresh("bert")
    delta = dt.attach(backbone, LoRA(rank=2), name="a", head=False)
    pair = dt.compose(backbone, [delta, dt.attach(backbone, LoRA(rank=2), name="b", head=False)])
    with pytest.raises(InvalidValue, match=words):
        call(backbone, delta, pair)


def test_shared_state_and_a_site_called_shared_are_kept_apart() -> None:
    backbone = nn.Sequential()
    backbone.add_module("shared", nn.Linear(16, 16))
    with pytest.raises(Unsupported, match="would go by the name of what the method shares"):
        dt.attach(backbone, small("compacter"), where="shared")
    assert dt.deltas(backbone) == []
    dt.attach(backbone, LoRA(rank=2), where="shared")


def _normalised() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).train(), torch.randn(5, 3, 4, 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_stay_as_they_are(compiled: bool, tmp_path: Any) -> None:
    backbone, x = _normalised()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    delta = dt.attach(backbone, LoRA(rank=2), where=["0", "4"])
    run: Any = torch.compile(backbone, backend="aot_eager") if compiled else backbone
    optimizer = torch.optim.SGD(delta.parameter_groups(0.1), lr=0.1)
    for _ in range(3):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert backbone[1].training, "train() and eval() of the caller stand"
    expected = backbone.eval()(x)
    dt.save(delta, tmp_path / "d")
    other, _ = _normalised()
    dt.load(other, tmp_path / "d")
    assert torch.equal(other.eval()(x), expected), "the file holds all that was learnt"
    dt.detach(delta)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    backbone.train()(x)
    assert int(backbone[1].num_batches_tracked) == 1, "a plain backbone tracks again"


def test_a_forward_broken_off_leaves_the_statistics_layers_in_training() -> None:
    backbone, x = _normalised()
    delta = dt.attach(backbone, LoRA(rank=2), where="0")
    with pytest.raises(RuntimeError):
        backbone(x[:, :1])
    assert backbone[1].training
    dt.detach(delta)
    assert backbone[1].training
