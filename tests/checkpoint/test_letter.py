"""The native format to the letter, for every method and way of composing: the same bytes anywhere, few of them, and nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.checkpoint.keys import fold, unfold
from deltatune.injection.slot import How
from deltatune.methods import BitFit, FullFineTuning
from deltatune.methods.kinds import Exported, methods
from deltatune.structure.index import index
from tests.checkpoint.deltas import backbone, files, small, train, trained

ROOT = Path(__file__).parents[2]
TRAINED_ELSEWHERE = {"pissa": {"start_A", "start_B"}, "frozen": {"weight", "bias"}}
"""Floating-point tensors that do not train and yet belong in the file: PiSSA's start, the head of the control that is only scored."""


@cache
def deep() -> nn.Module:
    """24 layers, as large models have, and next to nothing in each: what a tensor costs beside its values shows here."""
    size: dict[str, Any] = dict(hidden_size=8, num_hidden_layers=24, num_attention_heads=2, intermediate_size=8, vocab_size=101)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**size, num_labels=3)).eval()


def exported(delta: dt.Delta) -> dt.Delta:
    if isinstance(delta.method, Exported):
        delta.method.export(delta.patches, delta.shared)
    return delta


def within_bound(folder: Path, states: list[dict[str, Tensor]]) -> bool:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    values = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    return size <= 1.05 * values + 16 * 1024 + 150 * sum(map(len, states))


@pytest.mark.parametrize("name", methods)
def test_bytes_of_every_method(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    delta = exported(trained(deep(), replace(recipe, dimension=1000) if "dimension" in vars(recipe) else recipe))
    try:
        folder = dt.save(delta, tmp_path / "d")
        assert within_bound(folder, [delta.state_dict()])
        assert load_file(folder / "delta.safetensors").keys() == delta.state_dict().keys()
    finally:
        dt.detach(delta)


@pytest.mark.parametrize("how", get_args(How))
def test_bytes_of_every_composition(how: str, tmp_path: Path) -> None:
    members = [train(dt.attach(deep(), small("adapter"), name=name, head=False), seed=k) for k, name in enumerate(("one", "two"))]
    composition = dt.compose(deep(), members, how, weights=(0.5, 0.5) if how == "weighted" else None)
    try:
        folder = dt.save(composition, tmp_path / "d")
        assert within_bound(folder, [delta.state_dict() for delta in members] + [composition.mixing.state_dict()])
    finally:
        dt.detach(composition)


def test_a_composition_of_many_is_within_the_bound(tmp_path: Path) -> None:
    """What tells its backbone stands in it once, not once a member."""
    members = [dt.attach(deep(), small("lora"), name=f"m{k}", head=False) for k in range(10)]
    composition = dt.compose(deep(), members)
    try:
        folder = dt.save(composition, tmp_path / "d")
        assert within_bound(folder, [delta.state_dict() for delta in members])
    finally:
        dt.detach(composition)


@pytest.mark.parametrize("name", methods)
def test_only_what_was_learnt_is_stored(name: str) -> None:
    """Frozen bases come from a seed; masks are integers or bits; a difference at few places is its places and values."""
    delta = exported(trained(backbone("bert")[0], name))
    learnt = delta.trained_parameters().keys()
    beside = {key.rpartition(".")[2] for key, tensor in delta.state_dict().items() if key not in learnt and tensor.is_floating_point()}
    assert beside <= TRAINED_ELSEWHERE.get(name, set())


@pytest.mark.parametrize(
    ("name", "bits"), [("masking", 1), ("diff-pruning", 64 * 0.005), ("fish-mask", 64 * 0.005), ("random-subset", 0.16)]
)
def test_sparse_and_one_bit_methods_are_stored_as_such(name: str, bits: float) -> None:
    """Bits for each entry of the backbone that the method works on, rounding for its smallest parameters left aside."""
    delta = exported(dt.attach(backbone("bert")[0], methods[name](), "feed_forward.*", head=False))
    entries = sum(entry.parameter.numel() for entry in delta.entries)
    stored = 8 * sum(tensor.numel() * tensor.element_size() for tensor in delta.state_dict().values())
    assert stored <= bits * entries + 64 * len(delta.entries)


def test_shira_is_stored_by_values_alone() -> None:
    delta = dt.attach(backbone("bert")[0], small("shira"), "attention.query", head=False)
    kept = {key.rpartition(".")[2]: tensor.ndim for key, tensor in delta.state_dict().items()}
    assert set(kept.values()) == {1}


@pytest.mark.parametrize("method", [FullFineTuning(), BitFit()])
def test_a_tied_parameter_stands_in_the_file_once(method: Any, tmp_path: Path) -> None:
    model, _ = backbone("tied_mlp")
    delta = trained(model, method, where="*")
    tensors = load_file(dt.save(delta, tmp_path / "d") / "delta.safetensors")
    selected = {id(entry.parameter) for entry in delta.entries}
    assert len(tensors) == len(selected)
    assert sum(tensor.numel() for tensor in tensors.values()) <= sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["compacter", "vera", "did", "said", "adalora", "ladder-side-tuning"])
def test_state_common_to_sites_stands_in_the_file_once(name: str, tmp_path: Path) -> None:
    delta = exported(trained(backbone("bert")[0], name))
    tensors = load_file(dt.save(delta, tmp_path / "d") / "delta.safetensors")
    contents = [(tensor.dtype, tensor.shape, bytes(tensor.reshape(-1).view(torch.uint8).numpy())) for tensor in tensors.values()]
    assert len(set(contents)) == len(contents)


SAVE_ALL = """
import sys, warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import deltatune as dt
from deltatune.methods.kinds import methods
from tests.checkpoint.deltas import backbone, small, trained, train
for name in list(methods)[::-1] if sys.argv[2] == "backwards" else methods:
    torch.manual_seed(0)
    model, _ = backbone("bert")
    dt.save(trained(model, name), f"{sys.argv[1]}/{name}", unfinished=True, metrics={"b": 1.0, "a": 0.5}, versions={"z": "1", "a": "2"})
torch.manual_seed(0)
model, _ = backbone("bert")
pair = [train(dt.attach(model, small(name), name=name), seed=1) for name in ("lora", "adapter")]
dt.save(dt.compose(model, pair, "gated", name="both"), f"{sys.argv[1]}/both")
"""


def test_the_same_bytes_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    """Every method, saved at another time, under another path, in another order."""
    places = {"0": tmp_path / "here", "4242": tmp_path / "far" / "away"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_ALL, str(place), order],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for (seed, place), order in zip(places.items(), ("forwards", "backwards"), strict=True)
    ]
    assert [process.wait() for process in running] == [0, 0]
    here, away = (
        {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()} for place in places.values()
    )
    assert len(here) >= 2 * len(methods) + 5
    assert [name for name in here if here[name] != away.get(name)] == [] and here.keys() == away.keys()
    assert not any(str(tmp_path).encode() in content for content in here.values())


def test_saving_twice_gives_the_same_bytes_whatever_was_saved_between(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = trained(model, "compacter")
    dt.save(delta, tmp_path / "a")
    dt.save(trained(model, "full", name="other"), tmp_path / "b")
    dt.save(delta, tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "c")


KEYS: list[Callable[[], list[str]]] = [
    lambda: [site.key for site in index(backbone("gpt2")[0])],
    lambda: [site.key for site in index(backbone("mixtral")[0])],
    lambda: [site.key for site in index(deep())],
    lambda: ["a.{0..3}.b", "a.{.b", "}{", "", ".", "a..0", "007.1", "7.1", "a.12345678901", "a.1:query", "a.2:query", "1", "0"],
    lambda: [],
]


@pytest.mark.parametrize("keys", KEYS)
def test_folded_keys_unfold(keys: Callable[[], list[str]]) -> None:
    found = keys()
    assert sorted(unfold(fold(found))) == sorted(set(found))
    assert fold(found) == fold(reversed(found)) == fold(unfold(fold(found)))


def test_a_deep_model_takes_few_folded_keys() -> None:
    keys = [site.key for site in index(deep())]
    assert len(fold(keys)) < len(keys) / 10


LONG = "a" * 2000
BROKEN = ["a.{", "a.}", "{}", "{3..1}", "{1..}", "{..1}", "{01}", "{0..9999999999}", "{0..1048576}", "{1,,2}", "{0..1023}{0..1023}{0..1}"]
BROKEN += [f"{LONG}.{{0..1048000}}", f"{{0..99999}}.{LONG}"]  # a few bytes that stand for gigabytes


@pytest.mark.parametrize("pattern", BROKEN)
def test_folded_keys_that_are_none(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"brace|range|more than"):
        unfold([pattern])


def test_many_irregular_numbers_are_no_bomb() -> None:
    keys = [f"experts.{k * k}.up" for k in range(3000)]
    assert set(unfold(fold(keys))) == set(keys)
