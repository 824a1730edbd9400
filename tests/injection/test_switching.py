"""Many deltas that act at once: one more costs the same however many there are, and acts as if all had been arranged anew."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.injection.ledger import ledger_of
from deltatune.injection.outputs import OutputAct
from deltatune.injection.weights import Fold
from deltatune.methods import IA3, BitFit, DiffPruning, LoRA, PrefixTuning, PromptTuning
from tests.conformance.cells import shake
from tests.models import MODELS, output


def test_one_more_delta_adds_one_step_however_many_act(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    steps, step_of = [], OutputAct.steps_of
    monkeypatch.setattr(OutputAct, "steps_of", lambda *args: steps.append(args) or step_of(*args))
    counts = []
    for k in range(20):
        steps.clear()
        dt.attach(backbone, LoRA(rank=1), where=["0", "1"], name=f"d{k}")
        counts.append(len(steps))
    assert counts == [2] * 20


def test_one_more_delta_leaves_other_parameters_alone() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dt.attach(backbone, DiffPruning(), where="0", name="a")
    slot = backbone[0].deltatune
    (act,) = slot.acts.values()
    weight, bias = act.folds["weight"], act.folds["bias"]
    assert isinstance(weight, Fold)
    dt.attach(backbone, DiffPruning(), where="1", name="b")
    assert act.folds == {"weight": weight, "bias": bias}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_what_was_added_acts_as_if_arranged_anew(name: str) -> None:
    backbone, inputs = MODELS[name]()
    backbone.eval()
    everything = [LoRA(rank=2), DiffPruning(), BitFit(), PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2), IA3()]
    for k, method in enumerate([*everything, *everything]):
        if k == 6 and name == "t5":  # no biases
            continue
        if not (name == "t5" and isinstance(method, BitFit)):
            shake(dt.attach(backbone, method, name=f"d{k}", head=False))
    with torch.no_grad():
        added = output(backbone, inputs)
        ledger = ledger_of(backbone)
        assert ledger is not None
        ledger.arrange(ledger.deltas)
        assert torch.equal(output(backbone, inputs), added)
        with dt.disabled(backbone):
            late = dt.attach(backbone, LoRA(rank=2), name="late", head=False)
            shake(late)
            plain = output(backbone, inputs)
        both = output(backbone, inputs)
        assert not torch.equal(both, added)
        assert not torch.equal(both, plain)
        late.disable()
        torch.testing.assert_close(output(backbone, inputs), added)  # two selections of one bias are summed anew
        late.enable()
        assert torch.equal(output(backbone, inputs), both)


def test_a_transformer_encoder_agrees_to_rounding_while_all_rest_and_to_the_bit_once_all_are_gone() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    backbone, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = backbone(x)
        delta = dt.attach(backbone, LoRA(rank=2), where=r"re:.*linear[12]")
        shake(delta)
        assert not torch.allclose(backbone(x), plain)
        delta.disable()
        torch.testing.assert_close(backbone(x), plain)
        dt.detach(delta)
        assert torch.equal(backbone(x), plain)


def test_a_backbone_that_is_dropped_with_its_delta_is_freed() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    dt.attach(backbone, LoRA(rank=2), where="0")
    gone = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert gone() is None
