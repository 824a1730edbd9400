"""Any change of weights as a LoRA: exact where its rank suffices, else the nearest, with the error that is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.checkpoint.low_rank import approximate
from deltatune.errors import InvalidValue, Unsupported
from deltatune.methods import LoRA
from tests.checkpoint.deltas import backbone, small, train, trained
from tests.models import output


def found(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


@pytest.mark.parametrize(("name", "model", "where"), [
    ("lora", "bert", None),
    ("lora", "gpt2", ["attention.{query,value}", "feed_forward.up"]),
    ("adalora", "bert", None),
    ("loha", "bert", None),
    ("hira", "llama", None),
    ("full", "llama", ["attention.query", "feed_forward.down", "embedding"]),
    ("full", "gpt2", ["wte"]),
    ("hira", "mixtral", ["experts.up", "experts.down"]),
    ("vera", "bert", None),
    ("dora", "t5", None),
    ("diff-pruning", "llama", ["attention.query"]),
    ("masking", "llama", ["attention.value"]),
])  # fmt: skip
def test_full_rank_is_exact(name: str, model: str, where: list[str] | None, tmp_path: Path) -> None:
    first, inputs = backbone(model, head=1)
    delta = trained(first, name, where=where)
    if name == "masking":
        assert delta.trained_parameters()
    plain_head, expected = {name for name in delta.state_dict() if name.startswith("classifier")}, found(first, inputs)
    made = approximate(delta, 32)
    assert not delta.enabled and made.delta.enabled and made.left_out == ()
    assert made.error < 1e-5 and max(made.errors.values()) < 1e-5
    torch.testing.assert_close(found(first, inputs), expected, atol=1e-4, rtol=1e-3)
    assert {name for name in made.delta.state_dict() if name.startswith("classifier")} == plain_head
    dt.save(made.delta, tmp_path / "d")
    second, _ = backbone(model, head=2)
    dt.load(second, tmp_path / "d")
    torch.testing.assert_close(found(second, inputs), expected, atol=1e-4, rtol=1e-3)


def test_the_error_is_that_of_the_singular_values_left_out() -> None:
    model, _ = backbone("llama")
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    delta = trained(model, "full", where=["attention.query"])
    changes = [(model.state_dict()[name].double() - old) for name, old in before.items() if name.endswith("q_proj.weight")]
    values = [torch.linalg.svdvals(change) for change in changes]
    made = approximate(delta, 3)
    assert len(made.errors) == 2
    for error, S in zip(made.errors.values(), values, strict=True):
        assert error == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-4)
    missed = sum(float(S[3:].square().sum()) for S in values) / sum(float(S.square().sum()) for S in values)
    assert made.error == pytest.approx(missed**0.5, rel=1e-4)


def test_more_rank_is_nearer() -> None:
    errors = []
    for rank in (1, 4, 16):
        model, _ = backbone("bert")
        errors.append(approximate(trained(model, "full", where=["attention.query"], name="f"), rank, allow_left_out=True).error)
    assert errors[0] > errors[1] > errors[2] > 0


def test_vectors_are_not_silently_lost() -> None:
    model, inputs = backbone("bert")
    delta = trained(model, "full", where=["attention.query"])
    expected = found(model, inputs)
    with pytest.raises(Unsupported, match=r"also changes `bert.encoder.layer.0.attention.self.query.bias`.*--allow-left-out"):
        approximate(delta, 32)
    assert delta.enabled and torch.equal(found(model, inputs), expected)
    made = approximate(delta, 32, allow_left_out=True)
    assert made.left_out == tuple(f"bert.encoder.layer.{k}.attention.self.query.bias" for k in (0, 1))
    assert 0.05 < made.error < 0.5


def test_refusals() -> None:
    model, _ = backbone("bert")
    bias = trained(model, "bitfit", name="bias")
    with pytest.raises(Unsupported, match="`bias` changes no matrix"):
        approximate(bias)
    dt.detach(bias)
    adapter = trained(model, "adapter", name="a")
    with pytest.raises(Unsupported, match="cannot be merged"):
        approximate(adapter)
    with pytest.raises(InvalidValue, match="rank 0"):
        approximate(adapter, 0)


def test_a_sequence_becomes_one_lora() -> None:
    model, inputs = backbone("llama")
    members = [
        train(dt.attach(model, small(name), ["attention.query"], name=name.replace("-", "_")), seed=k)
        for k, name in enumerate(("lora", "dora"))
    ]
    composition = dt.compose(model, members, name="both")
    expected = found(model, inputs)
    made = approximate(composition, 32)
    assert not composition.enabled and isinstance(made.delta.method, LoRA)
    torch.testing.assert_close(found(model, inputs), expected, atol=1e-4, rtol=1e-3)
