"""What frozen layers give is computed once: the same training, with fewer forwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import InvalidValue
from deltatune.methods import Adapter, DiffPruning, LadderSideTuning, LinearProbe, LoRA, Method, PrefixTuning, PromptTuning
from deltatune.tasks.framing import HeadFraming
from deltatune.training.kept import KeptRows
from deltatune.training.train import train
from tests.training import tiny
from tests.training.test_types import DATA

LAYERS = {"bert": "bert.encoder.layer", "llama": "model.layers", "gpt2": "transformer.h"}


def run(model: nn.Module, method: Any, layers: Any = None, **settings: Any) -> Any:
    options = {"epochs": 2, "batch_size": 8, "evaluations": 0, "lr": 1e-2, "progress": "none"} | settings
    return train(model, tiny.data(), method, tokenizer=tiny.tokenizer(), layers=layers, **options)  # type: ignore[arg-type]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def state(result: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for delta in result.deltas for name, tensor in delta.state_dict().items()}


def counted(model: nn.Module, path: str) -> Counter[int]:
    """How often each layer ran with gradients."""
    calls: Counter[int] = Counter()
    for place, layer in enumerate(model.get_submodule(path)):  # type: ignore[arg-type]
        first = next(module for module in layer.modules() if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm"))
        first.register_forward_hook(lambda *_, place=place: calls.update([place] if torch.is_grad_enabled() else []))
    return calls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frozen"


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(
    ("name", "method", "layers"),
    [
        ("bert", LoRA(rank=2), "top:1"),
        ("bert", LinearProbe(), None),
        ("bert", PrefixTuning(num_virtual_tokens=2), "top:1"),
        ("llama", Adapter(bottleneck_dim=4), "top:1"),
        ("gpt2", LoRA(rank=2), "top:1"),
    ],
    ids=lambda value: getattr(value, "__class__", type(value)).__name__ if isinstance(value, Method) else str(value),
)
def test_it_trains_as_without(name: str, method: Method, layers: Any, place: str) -> None:
    """Equal but for the order of sums: what is kept was computed in other batches."""
    plain = run(without_dropout(tiny.backbone(name)), method, layers)
    model = without_dropout(tiny.backbone(name))
    calls = counted(model, LAYERS[name])
    kept = run(model, method, layers, keep_frozen=place)
    found = [entry["loss"] for entry in kept.history if "loss" in entry]
    assert found == pytest.approx([entry["loss"] for entry in plain.history if "loss" in entry], abs=1e-5)
    for key, tensor in state(plain).items():
        torch.testing.assert_close(state(kept)[key], tensor, rtol=1e-3, atol=1e-4)
    frozen = 2 if layers is None else 1
    assert [calls[place] for place in range(2)] == [1 if place < frozen else 1 + kept.steps for place in range(2)]


@pytest.mark.parametrize("kind", ["choice", "span", "tagging"])
def test_rows_of_several_inputs_are_kept_as_well(kind: str, cache: Path, tmp_path: Path) -> None:
    """An option, or a window of a long text, is an input of its own; rows have different numbers of them."""
    model: Any = tiny.backbone("bert")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    options: dict[str, Any] = {"framing": "head", "new_head": True, "epochs": 2, "batch_size": 5, "evaluations": 0, "lr": 1e-2}
    runs = [
        train(str(tmp_path / "bert"), DATA[kind], "lora", layers="top:1", keep_frozen=place, progress="none", **options)  # type: ignore[arg-type]
        for place in (None, "disk")
    ]
    assert len(list(cache.iterdir())) == 1
    plain, kept = ([entry["loss"] for entry in run.history if "loss" in entry] for run in runs)
    assert kept == pytest.approx(plain, abs=1e-5) and kept != []
    plain, kept = (state(run) for run in runs)
    for key, tensor in plain.items():
        if not key.endswith("bias"):  # one for all options or places has no gradient but rounding, of which AdamW makes steps
            torch.testing.assert_close(kept[key], tensor, rtol=1e-3, atol=1e-4)


def test_the_bits_do_not_depend_on_where_and_when(cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": "top:1", "epochs": 3}
    memory = state(run(tiny.backbone("bert"), LoRA(rank=2), keep_frozen="memory", **options))
    written = state(run(tiny.backbone("bert"), LoRA(rank=2), keep_frozen="disk", **options))
    [file] = cache.iterdir()
    before = file.stat().st_ino
    read = state(run(tiny.backbone("bert"), LoRA(rank=2), keep_frozen="disk", **options))
    assert [file.stat().st_ino for file in cache.iterdir()] == [before]
    for name, tensor in memory.items():
        assert torch.equal(tensor, written[name]) and torch.equal(tensor, read[name])


def test_in_one_batch_it_is_the_same_to_the_bit() -> None:
    """What is kept was computed in the training's own batch, so nothing is summed in another order."""
    found = {}
    options: dict[str, Any] = {"layers": "top:1", "epochs": 4, "batch_size": 9, "evaluations": 0, "progress": "none"}
    for keep in (None, "memory"):
        model = without_dropout(tiny.backbone("bert"))
        result = train(model, tiny.data(train=9), LoRA(rank=2), tokenizer=tiny.tokenizer(), keep_frozen=keep, **options)  # type: ignore[arg-type]
        found[keep] = state(result)
    assert all(torch.equal(tensor, found["memory"][name]) for name, tensor in found[None].items())


@pytest.mark.parametrize("change", ["backbone", "rows", "cut", "frozen delta", "nothing"])
def test_what_decides_the_states_is_in_the_key(change: str, cache: Path) -> None:
    framing = HeadFraming(tiny.data().task, tiny.tokenizer(), 64)

    def keep(model: nn.Module, rows: int = 12, layers: Any = "top:1", below: bool = False) -> KeptRows:
        if below:
            torch.manual_seed(3)
            frozen = dt.attach(model, Adapter(bottleneck_dim=2), layers=[0], name="frozen", head=False)
            with torch.no_grad():
                for parameter in frozen.parameters():
                    parameter.add_(0.1)
            frozen.freeze()
        dt.attach(model, LoRA(rank=2), layers=layers, name="trained")
        return KeptRows(model, framing, framing.encode(tiny.data(train=rows).train), "disk")

    first = keep(tiny.backbone("bert")).states.clone()
    model = tiny.backbone("bert")
    if change == "backbone":
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.bias.add_(0.5)  # type: ignore[union-attr, operator]
    second = keep(model, 15 if change == "rows" else 12, "top:1", below=change == "frozen delta") if change != "cut" else None
    if change == "cut":
        dt.attach(model, LinearProbe(), name="probe")
        second = KeptRows(model, framing, framing.encode(tiny.data(train=12).train), "disk")
    assert second is not None
    if change == "nothing":
        assert torch.equal(first, second.states) and len(list(cache.iterdir())) == 1
    else:
        assert len(list(cache.iterdir())) == 2
        assert first.shape != second.states.shape or not torch.equal(first, second.states)


@pytest.mark.parametrize(
    ("method", "layers", "said"),
    [
        (LoRA(rank=2), None, "lowest layer"),
        (PromptTuning(num_virtual_tokens=2), None, "lowest layer"),
        (LadderSideTuning(), None, "lowest layer"),
        (DiffPruning(), "top:1", "phases"),
    ],
)
def test_where_nothing_is_frozen_it_says_so(method: Method, layers: Any, said: str) -> None:
    model = tiny.backbone("bert")
    with pytest.raises(InvalidValue, match=said):
        run(model, method, layers, keep_frozen="memory")
    assert not dt.deltas(model) and all("forward" not in vars(module) for module in model.modules())


def test_dropout_rests_below_and_works_above() -> None:
    model = tiny.backbone("bert")
    dt.attach(model, LoRA(rank=2), layers="top:1")
    framing = HeadFraming(tiny.data().task, tiny.tokenizer(), 64)
    kept = KeptRows(model, framing, framing.encode(tiny.data(train=6).train), "memory")
    model.train()
    layers = model.bert.encoder.layer  # type: ignore[union-attr]
    with kept.given([0, 1, 2]):
        assert not layers[0].training and not model.bert.embeddings.training and layers[1].training  # type: ignore[index, union-attr]
    assert all(module.training for module in model.modules())


def test_no_room(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("deltatune.training.kept._free_memory", lambda: 100)
    with pytest.raises(InvalidValue, match="of memory are free"):
        run(tiny.backbone("bert"), LoRA(rank=2), "top:1", keep_frozen="memory")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 100})())
    with pytest.raises(InvalidValue, match="DELTATUNE_CACHE"):
        run(tiny.backbone("bert"), LoRA(rank=2), "top:1", keep_frozen="disk")
    assert not list(cache.iterdir())


def test_the_oldest_goes_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("deltatune.training.kept.MOST_BYTES", 1)
    for name in ("bert", "llama"):
        run(tiny.backbone(name), LoRA(rank=2), "top:1", keep_frozen="disk", max_steps=1)
    assert len(list(cache.iterdir())) == 1
