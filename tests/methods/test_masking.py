"""Masking: thresholded scores, gradients straight through, initial sparsity, and one bit an entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.injection.merge import merge
from deltatune.methods import Masking
from deltatune.methods.specification.masking import Init, MaskedWeight, packed, unpacked
from tests.conformance.cells import fresh, shake
from tests.models import output

TAU = 1e-2


def _patches(delta: Delta) -> dict[str, MaskedWeight]:
    return {entry.key: entry.patch for entry in delta.entries if isinstance(entry.patch, MaskedWeight)}


def test_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    delta = attach(backbone, Masking(), "0")
    backbone.double()
    shake(delta, spread=0.5)
    (patch,) = _patches(delta).values()
    W, b = backbone[0].weight.detach(), backbone[0].bias.detach()
    z = torch.where(patch.m.detach() > TAU, 1.0, 0.0).double().requires_grad_()
    assert 0 < int(z.sum()) < z.numel()
    found, expected = backbone(x), x @ (W * z).T + b
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    (straight,) = torch.autograd.grad(expected.square().sum(), z)  # dL/dm = dL/dz = dL/dW' * W
    (gradient,) = torch.autograd.grad(found.square().sum(), patch.m)
    torch.testing.assert_close(gradient, straight, atol=1e-10, rtol=1e-10)
    assert set(_patches(delta)) == {"0.weight"}, "biases have no mask"


@pytest.mark.parametrize("sparsity", [0.05, 0.5])
@pytest.mark.parametrize("init", ["scaled", "magnitude", "random"])
def test_the_initial_sparsity(init: Init, sparsity: float) -> None:
    torch.manual_seed(0)
    theta = torch.randn(300, 200)
    m = Masking(init=init, initial_sparsity=sparsity).scores(theta)
    dropped = m <= TAU
    assert abs(float(dropped.float().mean()) - sparsity) < 0.005
    if init == "scaled":
        c = 2e-2
        s = (c + TAU) / sparsity - c
        assert -c <= float(m.min()) < -0.9 * c
        assert 0.99 * s < float(m.max()) <= s
        return
    assert set(m.unique().tolist()) == {0.0, torch.tensor(2 * TAU).item()}
    assert int(dropped.sum()) == round(sparsity * theta.numel())
    if init == "magnitude":
        assert theta[dropped].abs().max() <= theta[~dropped].abs().min()


def test_without_initial_sparsity_it_is_the_identity() -> None:
    backbone, inputs = fresh("bert")
    with torch.no_grad():
        plain = output(backbone, inputs)
        attach(backbone, Masking(init="magnitude", initial_sparsity=0.0), head=False)
        assert torch.equal(output(backbone, inputs), plain)


def test_default_places_are_the_matrices_of_the_layers() -> None:
    backbone, _ = fresh("bert")
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim == 2 and "encoder.layer" in name}
    assert set(_patches(attach(backbone, Masking(), head=False))) == matrices


@pytest.mark.parametrize("model", ["bert", "gpt2", "mixtral", "torch_encoder", "t5"])
def test_one_bit_an_entry(model: str, tmp_path: Path) -> None:
    backbone, inputs = fresh(model)
    recipe = Masking(initial_sparsity=0.3)
    delta = attach(backbone, recipe, head=False)
    shake(delta)
    entries = sum(patch.m.numel() for patch in _patches(delta).values())
    assert delta.budget().size_bytes == 4 * entries
    with torch.no_grad():
        expected = output(backbone, inputs)
    assert not recipe.is_exported(delta.patches)
    recipe.export(delta.patches, delta.shared)
    recipe.export(delta.patches, delta.shared)
    assert recipe.is_exported(delta.patches)
    assert entries / 8 <= delta.budget().size_bytes <= entries / 8 + len(_patches(delta))
    save(delta, tmp_path / "saved")
    other, _ = fresh(model)
    loaded = load(other, tmp_path / "saved")
    assert isinstance(loaded, Delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), expected)
        assert torch.equal(output(other, inputs), expected)
        merge(loaded)
        assert torch.equal(output(other, inputs), expected)


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 1000])
def test_bits(entries: int) -> None:
    mask = torch.rand(entries, generator=torch.Generator().manual_seed(0)) > 0.4
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-entries // 8)
    assert torch.equal(unpacked(bits, entries).bool(), mask)
    assert all(int(bits[j // 8]) >> j % 8 & 1 == int(mask[j]) for j in range(entries))


def test_two_masks_keep_what_both_keep() -> None:
    backbone, inputs = fresh("tied_mlp")
    masks = []
    for name in ("a", "b"):
        delta = attach(backbone, Masking(init="random", initial_sparsity=0.4), "last", name=name)
        masks.append(_patches(delta)["last.weight"].mask().detach())
    seen: list[Tensor] = []
    backbone.get_submodule("last").register_forward_pre_hook(lambda module, _: seen.append(module._parameters["weight"]))
    with torch.no_grad():
        output(backbone, inputs)
        assert torch.equal(seen[0], backbone.get_parameter("last.weight") * masks[0] * masks[1])


def test_scores_do_not_decay() -> None:
    backbone, _ = fresh("bert")
    delta = attach(backbone, Masking())
    rest, scores = delta.parameter_groups(lr=0.01)
    assert scores["weight_decay"] == 0.0
    assert {id(p) for p in scores["params"]} == {id(patch.m) for patch in _patches(delta).values()}
    assert len(rest["params"]) == 2, "the head"


def test_magnitudes_must_be_readable() -> None:
    with torch.device("meta"):
        backbone = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(Unsupported, match=r"Masking\(init='magnitude'\) was asked to read .* is offloaded\. Load the backbone in memory"):
        attach(backbone, Masking(init="magnitude"), "0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(threshold=0.0), r"Masking\(threshold=0\.0\) was asked for; `threshold` must be greater than 0"),
        (dict(initial_sparsity=1.0), r"`initial_sparsity` must be at least 0 and less than 1"),
        (dict(init="ones"), r"`init` is one of `scaled`, `magnitude`, `random`"),
        (dict(init="scaled", initial_sparsity=0.0), r"needs a share greater than 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        Masking(**fields)
