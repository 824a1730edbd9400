"""What LoRA can be besides: ranks by role, other starts of A, LoRA+ and LoRA-FA."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.attach import attach
from deltatune.methods import LoRA, LoRAFA, LoRAPlus
from deltatune.methods.making import make
from tests.conformance.cells import fresh, shake
from tests.models import output


def test_ranks_by_role_and_by_path() -> None:
    backbone, inputs = fresh("bert")
    method = LoRA(rank=3, alpha=6, ranks=(("attention.query", 2), ("layer.1.*.dense", 7), ("feed_forward.{up,down}", 5)))
    delta = attach(backbone, method, ["attention.{query,value}", "feed_forward.*"], head=False)
    ranks = {(entry.site.layer, entry.site.leaf): entry.patch.lora_A.shape[0] for entry in delta.entries}
    assert ranks == {(k, leaf): rank for k, wide in ((0, 5), (1, 7)) for leaf, rank in dict(query=2, value=3, up=wide, down=wide).items()}
    assert {entry.patch.scale for entry in delta.entries} == {6 / 2, 6 / 3, 6 / 5, 6 / 7}
    output(backbone, inputs)
    backbone, _ = fresh("bert")
    by_path = LoRA(ranks=(("layer.1.intermediate.dense", 7),))
    delta = attach(backbone, by_path, "feed_forward.up", head=False)
    assert [entry.patch.lora_A.shape[0] for entry in delta.entries] == [8, 7]


def test_a_rank_that_fits_no_site_is_an_error() -> None:
    backbone, _ = fresh("bert")
    with pytest.raises(
        NoSite, match=r"rank 4 at `attention.qurey`, which fits none of its 4 sites \(`attention.query`, `attention.value`\)"
    ):
        attach(backbone, LoRA(ranks=(("attention.qurey", 4),)))


def test_ranks_on_the_command_line() -> None:
    made = make("lora", {"ranks": "attention.{query,value}:4, a.b:query:16"})
    assert made == LoRA(ranks=(("attention.{query,value}", 4), ("a.b:query", 16)))
    assert make("lora", {"ranks": [["experts.*", 2]]}) == LoRA(ranks=(("experts.*", 2),))
    with pytest.raises(InvalidValue, match=r"`ranks` takes entries such as text:8 with commas between them, such as ranks=text:8"):
        make("lora", {"ranks": "attention.query"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(ranks=(("attention.query", 0),)), "each entry is a role or a path, and a rank of at least 1"),
        (dict(ranks=(("attention.{query", 2),)), "a brace without its partner"),
        (dict(init="zeros"), "`init` is one of `kaiming`, `gaussian`, `orthogonal`"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        LoRA(**fields)


def test_starts_of_a() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(400, 300))
    A, B = (parameter.detach() for parameter in attach(backbone, LoRA(rank=50, init="orthogonal"), "0").parameters())
    torch.testing.assert_close(A @ A.T, torch.eye(50), atol=1e-5, rtol=0)
    assert not B.any()
    A, B = (parameter.detach() for parameter in attach(backbone, LoRA(rank=50, init="gaussian"), "0").parameters())
    assert math.isclose(float(A.std()), 1 / 50, rel_tol=0.02)
    assert not B.any()


def test_experts_start_apart() -> None:
    backbone, _ = fresh("mixtral")
    for init in ("kaiming", "gaussian", "orthogonal"):
        delta = attach(backbone, LoRA(rank=2, init=init), "*.experts.down_proj", layers=0)  # type: ignore[arg-type]
        (patch,) = delta.patches
        assert isinstance(patch.lora_A, nn.Parameter) and patch.lora_A.ndim == 3
        assert (patch.lora_A[0] - patch.lora_A[1]).abs().max() > 1e-3
        if init == "orthogonal":
            torch.testing.assert_close(patch.lora_A @ patch.lora_A.mT, torch.eye(2).expand(4, 2, 2), atol=1e-5, rtol=0)


def test_lora_plus_is_lora_with_a_fast_b() -> None:
    backbone, inputs = fresh("llama")
    torch.manual_seed(1)
    delta = attach(backbone, LoRAPlus(rank=4, alpha=6, ratio=10))
    torch.manual_seed(1)
    other, _ = fresh("llama")
    plain = attach(other, LoRA(rank=4, alpha=6))
    for one in (delta, plain):
        shake(one)
    assert torch.equal(output(backbone, inputs), output(other, inputs))
    slow, fast = delta.parameter_groups(2e-4)
    assert slow["lr"] == 2e-4 and fast["lr"] == 10 * 2e-4
    factors = {name: id(parameter) for name, parameter in delta.trained_parameters().items()}
    assert {id(parameter) for parameter in fast["params"]} == {key for name, key in factors.items() if name.endswith("lora_B")}
    assert {id(parameter) for parameter in slow["params"]} == {key for name, key in factors.items() if name.endswith("lora_A")}
    with pytest.raises(InvalidValue, match="`ratio` must be greater than 0"):
        LoRAPlus(ratio=0)


def test_lora_fa_by_its_formula_and_its_seed() -> None:
    backbone = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = attach(backbone, LoRAFA(rank=3, alpha=2.5, seed=4), "0")
    backbone.double()
    shake(delta, spread=1.0)
    (patch,) = delta.patches
    assert list(delta.trained_parameters()) == ["0.lora_B"] == list(delta.state_dict())
    A, B = patch.lora_A, patch.lora_B
    assert isinstance(A, torch.Tensor) and A.abs().max() <= 7**-0.5 and A.std() > 0.1
    expected = x @ (backbone[0].weight + 2.5 / 3 * B @ A).T + backbone[0].bias
    torch.testing.assert_close(backbone(x), expected, atol=1e-10, rtol=1e-10)
    backbone(x).square().sum().backward()
    assert delta.trained_parameters()["0.lora_B"].grad is not None
    again = [attach(nn.Sequential(nn.Linear(7, 5)), LoRAFA(rank=3, seed=seed), "0").patches[0].lora_A for seed in (4, 5)]
    assert torch.equal(again[0], A.float()) and not torch.equal(again[0], again[1])  # type: ignore[arg-type, operator, union-attr]
    with pytest.raises(InvalidValue, match="`rank` must be greater than 0"):
        LoRAFA(rank=0)


def test_lora_fa_is_frozen_everywhere_and_survives_copies() -> None:
    for model in ("mixtral", "gpt2", "torch_encoder"):
        backbone, inputs = fresh(model)
        plain = output(backbone, inputs)
        delta = attach(backbone, LoRAFA(rank=2), None if model != "mixtral" else ["attention.query", "*.experts.down_proj"])
        assert torch.equal(output(backbone, inputs), plain)
        assert all(name.endswith("lora_B") for name in delta.trained_parameters())
        assert len({tuple(patch.lora_A.flatten()[:2].tolist()) for patch in delta.patches}) == len(delta.patches), "each site has its own A"  # type: ignore[operator, union-attr]
        shake(delta)
        expected = output(backbone, inputs)
        for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert torch.equal(output(twin, inputs), expected)
