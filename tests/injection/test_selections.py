"""Selections: the backbone's own Parameters train in place, each delta with its value and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune.errors import Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import compose
from deltatune.injection.delta import Delta
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.switching import disabled, switch
from deltatune.methods import BitFit, DiffPruning, FullFineTuning, LinearProbe, LoRA
from tests.conformance.cells import fresh, shake
from tests.conformance.trace import trace
from tests.models import output


def _linear() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)


def test_the_parameter_is_the_same_object_and_the_only_one() -> None:
    backbone, _ = _linear()
    names, objects = list(backbone.state_dict()), [id(parameter) for parameter in backbone.parameters()]
    delta = attach(backbone, FullFineTuning())
    shake(delta)
    assert [id(parameter) for parameter in delta.parameters()] == objects
    assert [id(parameter) for parameter in backbone.parameters()] == objects
    assert list(backbone.state_dict()) == names, "the original is neither parameter nor buffer"


def test_the_original_follows_the_backbone() -> None:
    backbone, x = _linear()
    plain = backbone(x).detach()
    delta = attach(backbone, FullFineTuning())
    shake(delta)
    backbone.double()
    (weight, bias) = (entry.choice.original for entry in delta.entries)
    assert weight.dtype == bias.dtype == torch.float64
    detach(delta)
    torch.testing.assert_close(backbone(x.double()), plain.double())


def test_the_last_enabled_trains_and_the_others_wait_as_differences() -> None:
    backbone, x = _linear()
    original = backbone[0].bias.detach().clone()
    a = attach(backbone, BitFit(), "0", name="a")
    shake(a, spread=1.0, seed=1)
    value_a = backbone[0].bias.detach().clone()
    b = attach(backbone, BitFit(), "0", name="b")
    assert torch.equal(backbone[0].bias, value_a), "a fresh selection changes nothing"
    shake(b, spread=1.0, seed=2)
    learnt = backbone[0].bias.detach() - value_a
    assert torch.equal(a.state_dict()["0.bias"], value_a)
    torch.testing.assert_close(b.state_dict()["0.bias"], original + learnt)
    a.disable()
    torch.testing.assert_close(backbone[0].bias, original + learnt)
    switch(backbone, "a")
    assert torch.equal(backbone[0].bias, value_a)
    switch(backbone, None)
    assert torch.equal(backbone[0].bias, original)
    a.enable()
    b.enable()
    torch.testing.assert_close(backbone[0].bias, value_a + learnt)
    backbone(x).sum().backward()


def test_weights_weigh_differences() -> None:
    backbone, _ = _linear()
    original = backbone[0].bias.detach().clone()
    values = []
    for name in ("a", "b"):
        delta = attach(backbone, BitFit(), "0", name=name)
        shake(delta, spread=1.0, seed=ord(name))
        values.append(backbone[0].bias.detach().clone())
        delta.disable()
    compose(backbone, ["a", "b"], "weighted", weights=[0.5, -2.0])
    torch.testing.assert_close(backbone[0].bias, original + 0.5 * (values[0] - original) - 2.0 * (values[1] - original))


def test_a_gradient_stays_with_the_delta_that_was_live() -> None:
    backbone, x = _linear()
    a = attach(backbone, BitFit(), "0", name="a")
    backbone(x).sum().backward()
    gradient = backbone[0].bias.grad.clone()
    with disabled(backbone), torch.no_grad():
        assert backbone[0].bias.grad is None
        backbone(x)
    assert torch.equal(backbone[0].bias.grad, gradient), "a reference forward amid accumulation loses nothing"
    b = attach(backbone, BitFit(), "0", name="b")
    assert backbone[0].bias.grad is None
    b.disable()
    assert torch.equal(backbone[0].bias.grad, gradient)
    detach(a)
    assert backbone[0].bias.grad is None


def test_an_optimizer_that_goes_on_moves_nothing_while_the_delta_rests() -> None:
    backbone, x = _linear()
    plain = trace(backbone)
    delta = attach(backbone, FullFineTuning())
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    backbone(x).square().sum().backward()
    optimizer.step()
    delta.disable()
    optimizer.step()
    assert [found for found in trace(backbone).differences(plain) if found.startswith("bits")] == []
    detach(delta)
    assert trace(backbone).differences(plain) == []


def test_one_parameter_under_two_paths_has_one_value() -> None:
    """A head is selected as a whole by one delta, and part by part by another."""
    backbone, inputs = fresh("roberta")
    before = trace(backbone)
    with torch.no_grad():
        plain = output(backbone, inputs)
        a = attach(backbone, LinearProbe(), name="a")
        shake(a, seed=1)
        probed = output(backbone, inputs)
        a.disable()
        b = attach(backbone, BitFit(), "classifier.dense", name="b", head=False)
        shake(b, seed=2)
        biased = output(backbone, inputs)
        assert not torch.equal(biased, probed)
        for name, expected in (("a", probed), ("b", biased), (None, plain), ("a", probed)):
            switch(backbone, name)
            assert torch.equal(output(backbone, inputs), expected), name
        detach(a)
        detach(b)
    assert trace(backbone).differences(before) == []


def test_merged_weights_and_trained_parameters_do_not_mix() -> None:
    backbone, _ = fresh("bert")
    lora = attach(backbone, LoRA(rank=2), "attention.query", name="lora", head=False)
    shake(lora)
    full = attach(backbone, FullFineTuning(), "attention.query", name="full", head=False)
    with pytest.raises(Unsupported, match=r"would change `.*query\.weight`, which delta `full` trains in place\. Disable `full`"):
        merge(lora)
    full.disable()
    merge(lora)
    with pytest.raises(Unsupported, match=r"cannot train `.*query\.weight` in place while another delta is merged into it\. Unmerge that"):
        full.enable()
    with pytest.raises(Unsupported, match="in place while another delta is merged into it"):
        attach(backbone, FullFineTuning(), "attention.query", name="late", head=False)
    biases = attach(backbone, BitFit(), "attention.query", name="biases", head=False)
    shake(biases)
    kept = [entry.parameter.detach().clone() for entry in biases.entries]
    unmerge(lora)
    assert all(torch.equal(entry.parameter, value) for entry, value in zip(biases.entries, kept, strict=True)), "only W was merged"
    full.enable()


@pytest.mark.parametrize("method", [LoRA(rank=2), DiffPruning()])
def test_a_merge_for_good_is_what_a_selection_starts_from(method: LoRA | DiffPruning) -> None:
    backbone, inputs = fresh("tied_mlp")
    delta: Delta = attach(backbone, method, "last")
    shake(delta)
    merge(delta, keep=True)
    with torch.no_grad():
        expected = output(backbone, inputs)
        full = attach(backbone, FullFineTuning())
        assert torch.equal(output(backbone, inputs), expected)
        shake(full)
        detach(full)
        assert torch.equal(output(backbone, inputs), expected)
