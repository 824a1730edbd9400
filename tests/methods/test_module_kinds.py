"""Every method at every kind of module: linears, ``Conv1D``, convolutions, embeddings, attention and raw parameters.

A method is taken unless the table here says that it refuses; where it is taken, a fresh delta is the identity it promises to be,
a trained one acts and gets gradients, its merge computes the same, and it leaves without a trace.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.errors import DeltaError, NoSite, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import TrainableTokens
from tests.conformance.cells import TRAINING, moved, shake, small
from tests.conformance.trace import trace
from tests.methods.oracles.hosts import HOSTS
from tests.models import output

RAW = ("attention", "raw-kernel", "raw-stack", "raw-stack-transposed")
KINDS = ("mlp", "transposed", "conv1d", "conv2d", "conv3d", "conv2d-grouped", "embedding", *RAW)
"""Hosts of the oracle table, one for each kind of module."""

BOTTLENECKS = {
    "adapter",
    "adapter-drop",
    "compacter",
    "compacter-plus-plus",
    "invertible-adapter",
    "loreft",
    "low-rank-adapter",
    "pfeiffer-adapter",
    "phm-adapter",
}
"""They edit what a module returns, and a parameter that is read without calling its module returns nothing."""

ELSEWHERE = {
    "embedding-prefix-tuning",
    "ladder-side-tuning",
    "last-layer",
    "last-layers",
    "mam",
    "multi-head-parallel-adapter",
    "norm-tuning",
    "p-tuning",
    "p-tuning-v2",
    "parallel-adapter",
    "prefix-tuning",
    "prompt-tuning",
    "scaled-parallel-adapter",
    "selective-modules",
    "unipelt",
}
"""They act on a text stack, an attention, a sub-layer, a layer or a norm, and on no single module."""

REFUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(BOTTLENECKS, RAW),
    **dict.fromkeys(ELSEWHERE, KINDS),
    **dict.fromkeys(("bitfit", "partial-bitfit"), ("embedding", *RAW)),  # a table has no bias, and a raw one is a site of its own
    "oft": ("conv2d-grouped",),  # no whole number of blocks
    "random-subset": ("attention",),  # its draw leaves them out: too few entries
    "trainable-tokens": tuple(kind for kind in KINDS if kind != "embedding"),
}
TAKEN = [(method, kind) for method in TRAINING for kind in KINDS if kind not in REFUSED.get(method, ())]
REFUSING = [(method, kind) for method in TRAINING for kind in REFUSED.get(method, ())]


def put(backbone: nn.Module, method: str, kind: str) -> Delta:
    torch.manual_seed(1)
    recipe = TrainableTokens(token_ids=tuple(range(1, 20))) if method == "trainable-tokens" else small(method)
    return attach(backbone, recipe, list(HOSTS[kind].where), head=False)


@pytest.mark.parametrize(("method", "kind"), TAKEN)
def test_it_is_taken(method: str, kind: str) -> None:
    backbone, inputs = HOSTS[kind].build()
    with torch.no_grad():
        plain = output(backbone, inputs)
        delta = put(backbone, method, kind)
        if type(delta.method).identity:
            assert torch.equal(output(backbone, inputs), plain)
    shake(delta, spread=0.1)
    acting = output(backbone, inputs)
    assert moved(acting.detach(), plain) > 1e-5
    acting.square().mean().backward()
    assert delta.trained_parameters()
    assert all(parameter.grad is not None for parameter in delta.trained_parameters().values())
    try:
        dt.merge(delta)
    except Unsupported as error:
        assert re.search(r"is no change of a weight|adds virtual positions", str(error))
    else:
        with torch.no_grad():
            torch.testing.assert_close(output(backbone, inputs), acting.detach(), atol=1e-5, rtol=1e-5)
        dt.unmerge(delta)
    dt.detach(delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize(("method", "kind"), REFUSING)
def test_or_the_error_says_why_not(method: str, kind: str) -> None:
    backbone, _ = HOSTS[kind].build()
    before = trace(backbone)
    with pytest.raises(DeltaError) as caught:
        put(backbone, method, kind)
    assert caught.type in (NoSite, Unsupported)
    message = str(caught.value)
    assert any(where in message for where in HOSTS[kind].where), message
    assert re.search(r"Choose|Use ", message), message
    assert trace(backbone).differences(before) == []


@pytest.mark.parametrize("method", ["adapter", "dora", "ia3", "lora"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@torch.no_grad()
def test_transposed_convolutions_have_their_channels_where_convolutions_have_them(method: str, spatial: int) -> None:
    torch.manual_seed(0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    backbone, x = nn.Sequential(kind(8, 9, 3)).eval(), torch.randn(2, 8, *[7] * spatial)
    plain = backbone(x)
    assert plain.shape[1] == plain.shape[-1] == 9  # so that the wrong axis would go unnoticed
    delta = attach(backbone, small(method), "0", head=False)
    assert torch.equal(backbone(x), plain)
    shake(delta, spread=0.1)
    assert moved(backbone(x), plain) > 1e-5
    patch = delta.patches[0]
    if method in ("adapter", "ia3"):
        by_hand = patch(x.movedim(1, -1), plain.movedim(1, -1)).movedim(-1, 1)
        assert torch.equal(backbone(x), by_hand)
