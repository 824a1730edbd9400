"""DID and SAID: one vector moves every parameter of a backbone through projections of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import InvalidValue, Unsupported
from deltatune.injection.attach import attach, detach
from deltatune.injection.delta import Delta
from deltatune.methods import DID, SAID
from deltatune.methods.reparameterization.random_projection import PROJECTIONS
from deltatune.methods.reparameterization.subspace import ProjectedDifference, parts
from deltatune.structure.where import find_sites
from tests.conformance.cells import fresh, shake
from tests.models import output


def _projected(delta: Delta) -> dict[str, ProjectedDifference]:
    return {entry.key: entry.patch for entry in delta.entries if isinstance(entry.patch, ProjectedDifference)}


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("method", [DID(dimension=7), SAID(dimension=11), SAID(dimension=11, scale_per="layer")], ids=str)
def test_the_formula_in_double_precision(method: DID | SAID) -> None:
    backbone = _mlp()
    x = torch.randn(5, 4, dtype=torch.float64)
    plain = {name: tensor.detach().clone() for name, tensor in backbone.named_parameters()}
    delta = attach(backbone, method, "*")
    backbone.double()
    shake(delta, spread=0.5)
    trained = dict(delta.named_parameters())
    theta = trained["shared.theta"]
    scales = trained.get("shared.scales", torch.ones(4, dtype=torch.float64))
    if isinstance(method, SAID):
        assert len(theta) + len(scales) == 11
    moved = {}
    for key, patch in _projected(delta).items():
        P = torch.stack([patch.P(row) for row in torch.eye(len(theta), dtype=torch.float64)], 1)
        scale = scales[sorted(plain).index(key) if len(scales) == 4 else 0]
        moved[key] = plain[key] + scale * (P @ theta).view_as(plain[key])
    assert moved.keys() == plain.keys()
    expected = torch.tanh(x @ moved["0.weight"].T + moved["0.bias"]) @ moved["2.weight"].T + moved["2.bias"]
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("projection", list(PROJECTIONS))
def test_with_full_dimension_it_spans_the_space(projection: Any) -> None:
    """D independent directions: every difference of all 51 parameters at once has its theta^d."""
    backbone = _mlp()
    parameters = dict(backbone.named_parameters())
    D = sum(tensor.numel() for tensor in parameters.values())
    delta = attach(backbone, DID(dimension=D, projection=projection), "*")
    backbone.double()
    patches = _projected(delta)
    eye = torch.eye(D, dtype=torch.float64)
    P = torch.cat([torch.stack([patch.P(row) for row in eye], 1) for patch in patches.values()])
    assert P.shape == (D, D)
    assert torch.linalg.matrix_rank(P) == D
    wanted = {key: torch.randn_like(parameters[key]) for key in patches}
    difference = torch.cat([(wanted[key] - parameters[key]).flatten() for key in patches])
    with torch.no_grad():
        next(delta.parameters()).copy_(torch.linalg.solve(P, difference))
    for key, patch in patches.items():
        torch.testing.assert_close(patch(parameters[key]), wanted[key], atol=1e-6, rtol=1e-6)


def test_gradients_reach_theta_through_every_parameter() -> None:
    backbone, inputs = fresh("bert")
    delta = attach(backbone, DID(dimension=40), head=False)
    shake(delta, spread=0.1)
    patches = _projected(delta)
    plain = copy.deepcopy(backbone)
    detach(next(iter(plain.deltatune.deltas.values())))  # type: ignore[union-attr]
    theta = next(delta.parameters())
    moved = {key: patch(plain.get_parameter(key).detach()).detach().requires_grad_() for key, patch in patches.items()}
    loss = torch.func.functional_call(plain, moved, (), inputs).logits.square().mean()
    by_parameter = torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)
    expected = torch.zeros_like(theta)
    for patch, gradient in zip(patches.values(), by_parameter, strict=True):
        own = theta.detach().clone().requires_grad_()
        patch.P(own).dot(gradient.flatten()).backward()
        assert own.grad is not None
        expected += own.grad
    output(backbone, inputs).square().mean().backward()
    torch.testing.assert_close(theta.grad, expected, atol=1e-6, rtol=1e-4)


def test_one_vector_for_the_whole_model_and_one_scale_for_each_part() -> None:
    backbone, _ = fresh("t5")
    plain = attach(backbone, DID(dimension=200), head=False)
    assert plain.budget().delta == 200
    assert [name for name in plain.state_dict()] == ["shared.theta"]
    by_parameter = attach(backbone, SAID(dimension=200), head=False, name="parameter")
    by_layer = attach(backbone, SAID(dimension=200, scale_per="layer"), head=False, name="layer")
    assert by_parameter.budget().delta == by_layer.budget().delta == 200
    scales = {delta.name: len(dict(delta.named_parameters())["shared.scales"]) for delta in (by_parameter, by_layer)}
    assert scales == {"parameter": len(_projected(by_parameter)), "layer": 2 + 2 + 1}
    groups = {key: patch.group for key, patch in _projected(by_layer).items()}
    assert groups["encoder.block.0.layer.0.SelfAttention.q.weight"] == groups["encoder.block.0.layer.1.DenseReluDense.wi.weight"]
    assert groups["encoder.block.0.layer.0.SelfAttention.q.weight"] != groups["decoder.block.0.layer.0.SelfAttention.q.weight"]


def test_embeddings_on_request_and_heads_never() -> None:
    backbone, _ = fresh("gpt2")
    default = _projected(attach(backbone, DID(dimension=9), name="layers"))
    whole = _projected(attach(backbone, DID(dimension=9), "*", name="whole"))
    assert set(whole) - {key.partition(":")[0] for key in default} == {"transformer.wte.weight", "transformer.wpe.weight"}
    classifier, _ = fresh("bert")
    assert not any(key.startswith("classifier") for key in _projected(attach(classifier, DID(dimension=9), "*", head=False)))


def test_tied_and_fused_parameters() -> None:
    backbone, inputs = fresh("tied_mlp")
    delta = attach(backbone, DID(dimension=9), "*")
    assert "second.weight" not in _projected(delta), "moved once, under its first owner"
    shake(delta, spread=0.5)
    found = output(backbone, inputs)
    values = {key: patch(backbone.get_parameter(key)).detach() for key, patch in _projected(delta).items()}
    detach(delta)
    with torch.no_grad():
        for key, value in values.items():
            backbone.get_parameter(key).copy_(value)
        torch.testing.assert_close(output(backbone, inputs), found, atol=1e-6, rtol=1e-6)
    fused, _ = fresh("gpt2")
    roles = attach(fused, DID(dimension=9), "attention.{query,value}", layers=0)
    c_attn = fused.get_submodule("transformer.h.0.attn.c_attn")
    assert {key.rpartition(":")[2] for key in _projected(roles)} == {"query", "value"}
    shake(roles, spread=0.5)
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected, found = x @ c_attn.weight + c_attn.bias, c_attn(x)  # type: ignore[operator]
    torch.testing.assert_close(found[:, 32:64], expected[:, 32:64])
    assert all((found - expected)[:, part].abs().max(0).values.min() > 1e-3 for part in (slice(32), slice(64, 96)))


def _theta_prime(seed: int, order: int) -> dict[str, Tensor]:
    backbone, _ = fresh("bert")
    where = ["attention.query", "attention.value"][::order]
    delta = attach(backbone, DID(dimension=9, seed=seed), where, head=False)
    shake(delta)
    return {key: patch(backbone.get_parameter(key)).detach() for key, patch in _projected(delta).items()}


def test_projections_come_from_the_seed_and_the_name_alone() -> None:
    one, again, other = _theta_prime(0, 1), _theta_prime(0, -1), _theta_prime(1, 1)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    layers = [value - fresh("bert")[0].get_parameter(key) for key, value in one.items() if value.ndim == 2]
    assert not torch.allclose(layers[0], layers[1]), "equally shaped parameters move apart"


def test_parts_are_what_attach_patches() -> None:
    for model in ("bert", "gpt2", "torch_encoder", "tied_mlp", "mixtral"):
        backbone, _ = fresh(model)
        assert list(_projected(attach(backbone, DID(dimension=3), "*"))) == list(parts(find_sites(backbone, "*").sites))


def test_refusals() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(Unsupported, match=r"would draw .* random numbers for .* Choose projection='fastfood', fewer dimensions, or fewer"):
        attach(backbone, DID(dimension=100_000, projection="dense"))
    with pytest.raises(Unsupported, match=r"would draw .* Choose fewer dimensions, or fewer sites"):
        attach(backbone, SAID(dimension=10**9))
    with pytest.raises(
        Unsupported, match=r"on one scale for each parameter and has none left\. Choose dimension=\d+ or more, or scale_per"
    ):
        attach(backbone, SAID(dimension=20))
    for method, fields in ((DID, dict(dimension=0)), (DID, dict(projection="cosine")), (SAID, dict(scale_per="head"))):
        with pytest.raises(InvalidValue, match="was asked for"):
            method(**fields)  # type: ignore[arg-type, operator]
