"""What is saved comes back: the same outputs on a fresh instance of the backbone, and the same bytes when it is saved again."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint.tensors import read_tensors
from deltatune.methods import LoRA
from deltatune.methods.kinds import methods
from tests.checkpoint.deltas import backbone, files, same, small, state, train, trained
from tests.models import output

ONLY_A_HEAD = ("linear-probe", "frozen")
PAIRS = [(model, method) for model in ("bert", "gpt2", "t5") for method in methods if model == "bert" or method not in ONLY_A_HEAD]
PLAIN = [(model, method) for model in ("torch_encoder", "conv_net", "tied_mlp", "mixtral") for method in ("bitfit", "full", "diff-pruning")]


@pytest.fixture(autouse=True)
def _unexported() -> None:
    warnings.filterwarnings("ignore", message=".*training-time parameters.*")


@pytest.mark.parametrize(("model", "method"), PAIRS + PLAIN)
def test_round_trip(model: str, method: str, tmp_path: Path) -> None:
    first, inputs = backbone(model, head=1)
    delta = trained(first, method)
    dt.save(delta, tmp_path / "a")
    second, _ = backbone(model, head=2)
    before = state(second)
    with torch.no_grad():
        expected = output(first, inputs)
        assert not torch.equal(output(second, inputs), expected)
        loaded = dt.load(second, tmp_path / "a")
        assert torch.equal(output(second, inputs), expected)
    assert loaded.name == "d" and loaded.method == delta.method
    dt.save(loaded, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    dt.detach(loaded)
    assert same(state(second), before)


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "prompt-tuning", "adapter"])
def test_round_trip_bf16(method: str, tmp_path: Path) -> None:
    first, inputs = backbone("bert", head=1, dtype=torch.bfloat16)
    delta = trained(first, method)
    dt.save(delta, tmp_path / "a")
    second, _ = backbone("bert", head=2, dtype=torch.bfloat16)
    loaded = dt.load(second, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(output(first, inputs), output(second, inputs))
    dt.save(loaded, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert read(tmp_path / "a").stored.differences == ()


def test_the_types_of_patches_are_kept(tmp_path: Path) -> None:
    first, _ = backbone("bert")
    delta = trained(first)
    for entry in delta.entries:
        entry.patch.to(torch.bfloat16)
    dt.save(delta, tmp_path / "a")
    loaded = dt.load(backbone("bert")[0], tmp_path / "a")
    assert {tensor.dtype for name, tensor in loaded.state_dict().items() if "lora" in name} == {torch.bfloat16}


def test_bitfit_stores_exact_differences(tmp_path: Path) -> None:
    model, _ = backbone("bert", head=1)
    delta = trained(model, "bitfit")
    originals = {entry.key: entry.choice.original.clone() for entry in delta.entries}
    values = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    dt.save(delta, tmp_path / "a")
    stored = read(tmp_path / "a").stored
    assert stored is not None
    tensors = read_tensors(tmp_path / "a" / "delta.safetensors", stored.sha256)
    assert stored.values == ("classifier.bias", "classifier.weight")
    assert len(stored.differences) == len(originals) - 2
    for name in stored.differences:
        assert torch.equal(originals[name] + tensors[name], values[name])


def test_a_difference_that_would_lose_bits_is_stored_by_value(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = trained(model, "bitfit")
    bias = model.bert.encoder.layer[0].output.dense.bias
    with torch.no_grad():
        delta.entries[0].choice  # noqa: B018 - the originals exist before the parameter moves
        bias[0] = 1e-12
    dt.save(delta, tmp_path / "a")
    stored = read(tmp_path / "a").stored
    assert stored is not None and "bert.encoder.layer.0.output.dense.bias" in stored.values
    second, _ = backbone("bert")
    dt.load(second, tmp_path / "a")
    assert torch.equal(second.bert.encoder.layer[0].output.dense.bias, bias)


def test_fused_sites(tmp_path: Path) -> None:
    first, inputs = backbone("gpt2")
    delta = trained(first, LoRA(rank=2), where="attention.{query,value}")
    dt.save(delta, tmp_path / "a", where="attention.{query,value}")
    record = read(tmp_path / "a")
    assert record.sites == tuple(f"transformer.h.{k}.attn.c_attn:{role}" for k in range(2) for role in ("query", "value"))
    second, _ = backbone("gpt2")
    dt.load(second, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(output(first, inputs), output(second, inputs))


def test_the_sites_are_those_of_the_file_whatever_where_would_hit(tmp_path: Path) -> None:
    first, _ = backbone("bert")
    keys = ["bert.encoder.layer.1.attention.self.key", "bert.encoder.layer.0.intermediate.dense"]
    dt.save(trained(first, LoRA(rank=2), where=keys), tmp_path / "a", where="attention.query")
    loaded = dt.load(backbone("bert")[0], tmp_path / "a")
    assert sorted(entry.key for entry in loaded.entries if not entry.head) == sorted(keys)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize(("where", "head"), [(None, True), (None, False), ("readout", False)])
def test_heads(method: str, where: str | None, head: bool, tmp_path: Path) -> None:
    first, _ = backbone("bert", head=1)
    delta = trained(first, method, where=where, head=head)
    names = set(delta.state_dict())
    dt.save(delta, tmp_path / "a")
    loaded = dt.load(backbone("bert", head=2)[0], tmp_path / "a")
    assert set(loaded.state_dict()) == names
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in delta.state_dict().items())
    assert read(tmp_path / "a").origin.num_labels == (3 if any(entry.head for entry in delta.entries) else None)


def test_several_deltas_on_one_backbone(tmp_path: Path) -> None:
    model, inputs = backbone("bert", head=1)
    expected = {}
    for k, name in enumerate(("lora", "bitfit", "full")):
        delta = train(dt.attach(model, small(name), name=name.replace("-", "_")), seed=k)
        with torch.no_grad():
            expected[name] = output(model, inputs)
        dt.save(delta, tmp_path / name)
        delta.disable()
    second, _ = backbone("bert", head=2)
    for name in expected:
        dt.load(second, tmp_path / name, enable=False)
    for name, outputs in expected.items():
        dt.switch(second, name)
        with torch.no_grad():
            assert torch.equal(output(second, inputs), outputs)


def test_saving_does_not_depend_on_what_acts(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = trained(model, "bitfit")
    dt.save(delta, tmp_path / "a")
    other = trained(model, "full", name="other")
    dt.save(delta, tmp_path / "b")
    other.disable()
    delta.disable()
    dt.save(delta, tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_a_merged_delta_is_saved_as_it_is(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = trained(model)
    dt.save(delta, tmp_path / "a")
    dt.merge(delta)
    dt.save(delta, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    dt.save(trained(backbone("bert")[0]), tmp_path / "a")
    model, _ = backbone("bert")
    before = torch.get_rng_state()
    dt.load(model, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_enable_and_name(tmp_path: Path) -> None:
    dt.save(trained(backbone("bert")[0]), tmp_path / "a")
    model, inputs = backbone("bert")
    with torch.no_grad():
        plain = output(model, inputs)
        delta = dt.load(model, tmp_path / "a", name="other", enable=False)
        assert delta.name == "other" and not delta.enabled
        assert torch.equal(output(model, inputs), plain)


def test_an_unexported_delta_says_so_and_can_go_on(tmp_path: Path) -> None:
    model, inputs = backbone("bert")
    delta = trained(model, "prefix-tuning")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="training-time parameters"):
            dt.save(delta, tmp_path / "a")
        dt.save(delta, tmp_path / "run", unfinished=True)
        assert read(tmp_path / "run").exported is False
        dt.load(backbone("bert")[0], tmp_path / "run")
        delta.method.export(delta.patches, delta.shared)
        dt.save(delta, tmp_path / "a")
    assert read(tmp_path / "a").exported is True
    assert (tmp_path / "a" / "delta.safetensors").stat().st_size < (tmp_path / "run" / "delta.safetensors").stat().st_size
    second, _ = backbone("bert")
    dt.load(second, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(output(model, inputs), output(second, inputs))


def test_buffers_of_a_phase_are_kept(tmp_path: Path) -> None:
    model, inputs = backbone("bert")
    delta = trained(model, "diff-pruning")
    delta.method.enter(delta.patches, "fine-tune")
    dt.save(delta, tmp_path / "a", unfinished=True)
    second, _ = backbone("bert")
    loaded = dt.load(second, tmp_path / "a")
    masks = [name for name in delta.state_dict() if name.endswith(".mask")]
    assert masks and all(torch.equal(delta.state_dict()[name], loaded.state_dict()[name]) for name in masks)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), output(second, inputs))


def test_the_record_keeps_what_it_is_told(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    told = {
        "where": ["attention.query", "attention.value"],
        "layers": range(2),
        "task": "bbc-news",
        "labels": ["a", "b", "c"],
        "template": {"text": "{text}"},
        "metric": "accuracy",
        "score": 0.5,
        "metrics": {"accuracy": 0.5},
        "training": {"lr": 1e-3, "steps": 3},
        "data": "abc",
        "versions": {"torch": "2"},
    }
    dt.save(trained(model), tmp_path / "a", backbone_id="minilm", **told)
    record = read(tmp_path / "a")
    assert record.origin.id == "minilm" and record.origin.dtype == "float32" and record.origin.num_labels == 3
    assert record.about.labels == ("a", "b", "c") and record.about.layers == (0, 1) and record.about.training == told["training"]
    assert record.build_method() == LoRA(rank=2) and record.fields["alpha"] == 16.0
    assert record.heads == ("classifier",) and len(record.sites) == 4


SCRIPT = """
import sys, torch, deltatune as dt
from deltatune.methods import LoRA
from torch import nn
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
delta = dt.attach(mlp, LoRA(rank=2), where=["0", "2"], name="d")
told = {name: {k: 1 for k in ("z", "a", "m")} for name in ("training", "versions", "metrics")} | {"versions": {"x": "1", "b": "2"}}
dt.save(delta, sys.argv[1], labels=["b", "a"], **told)
"""


def test_the_same_bytes_with_every_hash_seed(tmp_path: Path) -> None:
    places = {seed: tmp_path / f"somewhere-{seed}" / "d" for seed in ("0", "12345")}
    for seed, place in places.items():
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", SCRIPT, str(place)], env=environment, check=True)
    first, *others = [files(place) for place in places.values()]
    assert all(other == first for other in others)
    assert str(tmp_path).encode() not in first[0]


def test_bytes_are_few(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    for name in ("lora", "adapter", "ia3", "bitfit", "prompt-tuning", "full"):
        delta = trained(model, name)
        dt.save(delta, tmp_path / name)
        tensors = delta.state_dict()
        values = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        size = sum(map(len, files(tmp_path / name)))
        assert size <= 1.05 * values + 16 * 1024 + 150 * len(tensors)
        dt.detach(delta)


@pytest.mark.parametrize("method", ["prefix-tuning", "mam", "unipelt", "adalora", "vera", "compacter"])
def test_shared_state_and_buffers_come_back_in_half_precision(method: str, tmp_path: Path) -> None:
    """A delta that was cast along with its backbone, in the middle of its training."""
    first, inputs = backbone("bert", head=1)
    delta = trained(first, method)
    first.to(torch.bfloat16)
    dt.save(delta, tmp_path / "a", unfinished=True)
    second, _ = backbone("bert", head=2, dtype=torch.bfloat16)
    loaded = dt.load(second, tmp_path / "a")
    types = {name: tensor.dtype for name, tensor in delta.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    with torch.no_grad():
        assert torch.equal(output(first, inputs), output(second, inputs))
