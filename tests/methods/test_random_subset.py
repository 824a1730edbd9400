"""Random subsets, and the sparse differences they share with diff pruning and FISH masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue
from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import RandomSubset
from deltatune.methods.specification.random_subset import drawn
from deltatune.methods.specification.sparse import SparseDifference, index_type, largest
from tests.conformance.cells import fresh, shake
from tests.models import output

Part = Literal["entries", "rows", "columns"]


def _patches(delta: Delta) -> dict[str, SparseDifference]:
    return {entry.key: entry.patch for entry in delta.entries if isinstance(entry.patch, SparseDifference)}


@pytest.mark.parametrize("part", ["entries", "rows", "columns"])
def test_the_formula_in_double_precision(part: Part) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(20, 30)).double()
    x = torch.randn(3, 20, dtype=torch.float64)
    W, b = (parameter.detach().clone() for parameter in backbone.parameters())
    delta = attach(backbone, RandomSubset(density=0.2, part=part), "0")
    backbone.double()
    shake(delta, spread=0.7)
    patches = _patches(delta)
    v, i = patches["0.weight"].values, patches["0.weight"].index.tolist()
    dense = torch.zeros(30, 20, dtype=torch.float64)
    for j, at in enumerate(i):
        if part == "entries":
            dense[at // 20, at % 20] = v[j]
        elif part == "rows":
            dense[at] = v[j]
        else:
            dense[:, at] = v[:, j]
    if part != "columns":
        for j, at in enumerate(patches["0.bias"].index.tolist()):
            b[at] += patches["0.bias"].values[j]
    assert len(set(i)) == len(i) in {"entries": (120, 121), "rows": (6, 7), "columns": (4, 5)}[part]
    assert set(patches) == {"0.weight"} | ({"0.bias"} if part != "columns" else set())
    torch.testing.assert_close(backbone(x), x @ (W + dense).T + b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("model", ["bert", "gpt2", "mixtral", "torch_encoder", "t5"])
@pytest.mark.parametrize("part", ["entries", "rows", "columns"])
def test_the_share_is_kept_on_average(model: str, part: Part) -> None:
    backbone, inputs = fresh(model)
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, RandomSubset(density=0.1, part=part), "*", head=False)
    matrices = part == "columns"
    size = sum(p.numel() for n, p in fresh(model)[0].named_parameters() if (p.ndim > 1 or not matrices) and "classifier" not in n)
    assert abs(delta.budget().delta / (0.1 * size) - 1) < 0.12
    assert delta.budget().size_bytes == 4 * delta.budget().delta, "positions are drawn anew from the seed"
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
    shake(delta)
    with torch.no_grad():
        assert not torch.equal(output(backbone, inputs), plain)


def test_rows_of_a_transposed_weight_are_outputs() -> None:
    backbone, _ = fresh("gpt2")
    theta = backbone.get_parameter("transformer.h.0.mlp.c_fc.weight")  # (in, out)
    for part, axis in (("rows", 1), ("columns", 0)):
        delta = attach(backbone, RandomSubset(density=0.1, part=part), "feed_forward.up", name=part)  # type: ignore[arg-type]
        patch = _patches(delta)["transformer.h.0.mlp.c_fc.weight"]
        assert patch.axis == axis
        assert patch.values.shape[1 - axis] == theta.shape[1 - axis]


def test_slices_of_convolutions_and_experts() -> None:
    """Rows are output channels, whole with their kernels; all experts of a stack share theirs."""
    shapes = {}
    for model in ("conv_net", "mixtral"):
        for part in ("rows", "columns"):
            delta = attach(fresh(model)[0], RandomSubset(density=0.5, part=part), "*", head=False)  # type: ignore[arg-type]
            shapes |= {(key.rpartition(".mlp.")[2], part): tuple(patch.values.shape) for key, patch in _patches(delta).items()}
    assert shapes["conv2.weight", "rows"] == (8, 8, 3, 3)
    assert shapes["conv2.weight", "columns"] == (16, 4, 3, 3)
    assert shapes["experts.gate_up_proj", "rows"] == (4, 48, 32)
    assert shapes["experts.down_proj", "columns"] == (4, 32, 24)


def test_the_seed_and_the_place_draw() -> None:
    def positions(seed: int) -> dict[str, list[int]]:
        delta = attach(fresh("bert")[0], RandomSubset(density=0.05, seed=seed), "attention.{query,key}")
        return {key: patch.index.tolist() for key, patch in _patches(delta).items()}

    first = positions(1)
    assert first == positions(1) != positions(2)
    matrices = [tuple(index) for key, index in first.items() if key.endswith("weight")]
    assert len(set(matrices)) == len(matrices) == 4


def test_saved_and_loaded(tmp_path: Path) -> None:
    backbone, inputs = fresh("gpt2")
    delta = attach(backbone, RandomSubset(density=0.02), ["attention.query", "feed_forward.*"])
    shake(delta)
    save(delta, tmp_path / "saved")
    other, _ = fresh("gpt2")
    load(other, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(output(other, inputs), output(backbone, inputs))


@pytest.mark.parametrize(("size", "k"), [(1, 1), (10, 0), (10, 2), (10, 10), (100_000, 25), (100_000, 20_000), (7, 1)])
def test_draws_are_different_positions(size: int, k: int) -> None:
    found = drawn(size, k, torch.Generator().manual_seed(0))
    assert len(found) == len(set(found.tolist())) == k
    assert all(0 <= position < size for position in found.tolist())


def test_draws_are_uniform() -> None:
    counts = torch.zeros(40)
    for seed in range(2000):
        counts[drawn(40, 4, torch.Generator().manual_seed(seed))] += 1
    assert (counts / 200 - 1).abs().max() < 0.25


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_the_largest_entries_over_all_tensors(density: float) -> None:
    torch.manual_seed(0)
    scores = [torch.randn(6, 7), torch.randn(11), 5 + torch.randn(3, 3)]
    found = largest(scores, density)
    flat = torch.cat([score.flatten() for score in scores])
    budget = max(1, round(density * len(flat)))
    kept = torch.cat([score.flatten()[positions] for score, positions in zip(scores, found, strict=True)])
    assert sorted(kept.tolist()) == sorted(flat.topk(budget).values.tolist())
    assert all(positions.tolist() == sorted(positions.tolist()) for positions in found)


def test_ties_and_diverged_scores() -> None:
    ties = [torch.zeros(4), torch.zeros(4)]
    assert [found.tolist() for found in largest(ties, 0.75)] == [[0, 1, 2, 3], [0, 1]]
    broken = [torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([-float("inf"), float("inf")])]
    assert [found.tolist() for found in largest(broken, 0.4)] == [[1], [1]]


def test_positions_take_four_bytes_where_they_can() -> None:
    assert index_type(2**31 - 1) == torch.int32
    assert index_type(2**31) == torch.int64


def test_other_positions_keep_the_parameter() -> None:
    """An optimizer that was made before holds on to it."""
    patch = SparseDifference("weight", torch.zeros(4, 5), torch.tensor([1, 2]))
    values = patch.values
    optimizer = torch.optim.AdamW([values], lr=0.5, weight_decay=0.0)
    patch.choose(torch.tensor([0, 7, 19]))
    (patch(torch.zeros(4, 5)) - 1).square().sum().backward()
    optimizer.step()
    assert patch.values is values
    torch.testing.assert_close(patch(torch.zeros(4, 5)).detach().flatten()[[0, 7, 19]], torch.full((3,), 0.5))
    fresh_patch = SparseDifference("weight", torch.zeros(4, 5), torch.tensor([1]))
    fresh_patch.reform(patch.state_dict())
    fresh_patch.load_state_dict(patch.state_dict())
    assert _same(fresh_patch(torch.ones(4, 5)), patch(torch.ones(4, 5)))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(density=0.0), r"RandomSubset\(density=0\.0\) was asked for; `density` must be greater than 0 and at most 1"),
        (dict(part="heads"), r"`part` is one of `entries`, `rows`, `columns`"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        RandomSubset(**fields)
