"""Every method that routes, in one batch with others and plain rows, equals its rows alone; the others refuse with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import Unsupported
from deltatune.methods import IA3, Adapter, LoRA, PrefixTuning, PromptTuning
from deltatune.methods.kinds import Exported
from tests.conformance.cells import TRAINING, Cell, fresh, shake
from tests.models import output
from tests.multi.rows import batch, far, naive, routed

UNROUTABLE = {"did", "said", "full", "last-layer", "last-layers", "selective-modules"}
"""Whole weights, or what is made anew from one vector."""

ENCODER_ONLY = {"linear-probe", "bitfit", "partial-bitfit"}
HOSTS = {name: "bert" if name in ENCODER_ONLY or number % 2 else "llama" for number, name in enumerate(TRAINING)}


@pytest.mark.parametrize("name", TRAINING)
@torch.no_grad()
def test_it_routes(name: str) -> None:
    cell = Cell(name, HOSTS[name])
    backbone, _ = cell.fresh()
    for seed, own in enumerate(("x", "y")):
        delta = cell.attach(backbone, name=own)
        shake(delta, seed=seed)
        if isinstance(delta.method, Exported) and own == "x":
            delta.method.export(delta.patches, delta.shared)
    shake(dt.attach(backbone, LoRA(rank=2), name="low"), seed=9)
    dt.switch(backbone, None)
    entries = ["x", None, "y", "low", ["x", "low"], ["low", "y"]]
    inputs = batch(6)
    if name in UNROUTABLE:
        with pytest.raises(Unsupported, match="cannot be routed: at"):
            routed(backbone, entries, inputs)
        return
    plain, found = output(backbone, inputs), routed(backbone, entries, inputs)
    assert far(found, naive(backbone, entries, inputs)) < 1e-5
    assert all(far(found[i : i + 1], plain[i : i + 1]) > 1e-4 for i in (0, 2, 3, 4, 5))


OTHERS = ("gpt2", "opt", "roberta", "t5", "bart", "gemma3", "deberta_v2")


@pytest.mark.parametrize("model", OTHERS)
@torch.no_grad()
def test_other_architectures(model: str) -> None:
    """Fused projections, flattened tokens, learned and relative positions, two stacks, sliding windows."""
    backbone, example = fresh(model)
    methods = {"low": LoRA(rank=3), "scaled": IA3(), "bottle": Adapter(bottleneck_dim=4), "prompt": PromptTuning(3)}
    if model == "deberta_v2":
        methods |= {"low": LoRA(rank=3)}
    else:
        methods |= {"prefix": PrefixTuning(2, reparameterization=False), "short": PrefixTuning(1, reparameterization=False)}
    for seed, (name, method) in enumerate(methods.items()):
        where = "attention.value" if model == "deberta_v2" and name in ("low", "scaled") else None
        shake(dt.attach(backbone, method, where, name=name, head=False), seed=seed)
    dt.switch(backbone, None)
    entries = [*methods, None, ["prompt", "low"]]
    inputs = batch(len(entries), length=6, padding=model != "opt")
    if model in ("roberta", "bart"):
        inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, 1)
    if "decoder_input_ids" in example:
        inputs["decoder_input_ids"] = batch(len(entries), 4, padding=False, seed=8)["input_ids"]
    assert far(routed(backbone, entries, inputs), naive(backbone, entries, inputs)) < 1e-5


def test_rows_that_all_rows_share_are_refused() -> None:
    backbone, _ = fresh("deberta_v2")
    dt.attach(backbone, LoRA(rank=2), "attention.query", name="shared")
    with pytest.raises(Unsupported, match="no multiple of the batch"), dt.route(backbone, ["shared"]):
        pass


@torch.no_grad()
def test_a_copy_routes_by_itself() -> None:
    backbone, _ = fresh("llama")
    low = dt.attach(backbone, LoRA(rank=2), name="low")
    shake(low)
    dt.attach(backbone, IA3(), name="scaled")
    inputs = batch(2)
    found = routed(backbone, ["low", None], inputs)
    other = copy.deepcopy(backbone)
    shake(low, seed=5)
    assert torch.equal(routed(other, ["low", None], inputs), found)
    assert far(routed(backbone, ["low", None], inputs)[:1], found[:1].unbind()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("tokens", [4, 5])
def test_a_mask_that_looks_like_rows_is_none(tokens: int) -> None:
    """PyTorch's attentions take a mask (tokens, tokens) for all rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x, src_mask=mask)
            return y

    torch.manual_seed(0)
    net, entries = Net().train(), ["a", None, "b", "a"]
    for seed, name in enumerate("ab"):
        shake(dt.attach(net, LoRA(rank=2), "attention.query", name=name), seed=seed, spread=0.3)
    dt.switch(net, None)
    x, mask = torch.randn(4, tokens, 32), torch.ones(tokens, tokens).triu(1).bool()
    with dt.route(net, entries):
        found = net(x, mask)
    for row, name in enumerate(entries):
        dt.switch(net, name)
        assert far(found[row : row + 1], [net(x[row : row + 1], mask)[0]]) < 1e-5
