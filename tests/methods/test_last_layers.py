"""Last layer, last layers and selective modules: which layers and modules train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from deltatune.checkpoint.format import load, save
from deltatune.errors import InvalidValue, NoSite
from deltatune.injection.attach import attach
from deltatune.methods import LastLayer, LastLayers, Method, SelectiveModules
from tests.conformance.cells import fresh, shake
from tests.models import output

DEEP = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_attention_heads=2, max_position_embeddings=16)


def deep(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, **DEEP)).eval()  # type: ignore[arg-type]


def trained(backbone: nn.Module) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def below(backbone: nn.Module, *paths: str) -> set[str]:
    return {name for name, _ in backbone.named_parameters() if any(f"{path}." in name for path in paths)}


@pytest.mark.parametrize(
    ("model", "method", "paths"),
    [
        ("bert", LastLayer(), ["encoder.layer.1"]),
        ("gpt2", LastLayer(), ["h.1"]),
        ("opt", LastLayer(), ["decoder.layers.1"]),
        ("t5", LastLayer(), ["encoder.block.1"]),
        ("bart", LastLayer(), ["encoder.layers.1"]),
        ("torch_encoder", LastLayer(), ["layers.1"]),
        ("t5", LastLayers(), ["encoder.block.1", "decoder.block.1"]),
        ("bart", LastLayers(portion=0.5), ["encoder.layers.1", "decoder.layers.1"]),
        ("bert", LastLayers(portion=1.0), ["encoder.layer"]),
    ],
    ids=str,
)
def test_the_last_layers_train_whole(model: str, method: Method, paths: list[str]) -> None:
    backbone, inputs = fresh(model)
    own = below(backbone, *paths)
    with torch.no_grad():
        plain = output(backbone, inputs)
    delta = attach(backbone, method, head=False)
    assert trained(backbone) == own != set()
    assert {name for name, _ in delta.named_parameters()} == own
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (4, 1), (6, 2), (8, 2), (12, 3)])
def test_a_quarter_of_the_layers(layers: int, count: int) -> None:
    backbone = deep(layers)
    attach(backbone, LastLayers())
    assert trained(backbone) == below(backbone, *(f"encoder.layer.{k}" for k in range(layers - count, layers)))


def test_a_head_trains_beside_the_last_layer() -> None:
    backbone, _ = fresh("bert")
    attach(backbone, LastLayer())
    assert trained(backbone) == below(backbone, "encoder.layer.1") | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("method", [LastLayer(), LastLayers(), SelectiveModules()], ids=str)
def test_models_without_layers_are_refused(method: Method) -> None:
    with pytest.raises(NoSite, match=r"Choose sites it can take|No site of Sequential"):
        attach(fresh("mlp")[0], method, "*")


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.3, 1.0])
def test_modules_fill_their_budget(budget: float) -> None:
    backbone = deep(6)
    modules = {path: module for path, module in backbone.encoder.named_modules() if module._parameters}
    size = sum(parameter.numel() for parameter in backbone.encoder.parameters())
    delta = attach(backbone, SelectiveModules(budget=budget))
    chosen = trained(backbone)
    assert budget * size - min(sum(p.numel() for p in module.parameters()) for module in modules.values()) <= delta.budget().delta
    assert delta.budget().delta <= budget * size
    for path, module in modules.items():
        own = {f"encoder.{path}.{name}" for name, _ in module.named_parameters()}
        assert own <= chosen or not own & chosen, "modules train whole"
    if budget == 0.3:
        assert len({name.split(".")[2] for name in chosen}) > 3, "from many layers"


def test_the_seed_chooses() -> None:
    def chosen(seed: int) -> frozenset[str]:
        backbone = deep(6)
        attach(backbone, SelectiveModules(seed=seed))
        return frozenset(trained(backbone))

    assert chosen(1) == chosen(1)
    assert len({chosen(seed) for seed in range(4)}) == 4


def test_both_stacks_have_their_own_budget() -> None:
    backbone, _ = fresh("t5")
    attach(backbone, SelectiveModules(budget=0.2))
    for stack in (backbone.get_submodule("encoder.block"), backbone.get_submodule("decoder.block")):
        parameters = list(stack.parameters())
        size = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        assert 0 < size <= 0.2 * sum(parameter.numel() for parameter in parameters)


def test_a_small_budget_takes_the_smallest_module() -> None:
    backbone, _ = fresh("bert")
    attach(backbone, SelectiveModules(budget=1e-4), head=False)
    (weight, bias) = sorted(trained(backbone), reverse=True)
    assert weight.endswith("LayerNorm.weight")
    assert bias.endswith("LayerNorm.bias")


@pytest.mark.parametrize("model", ["bert", "t5", "torch_encoder", "mixtral"])
@pytest.mark.parametrize("method", [LastLayer(), LastLayers(), SelectiveModules(budget=0.2)], ids=lambda method: type(method).__name__)
def test_a_file_names_what_was_chosen(model: str, method: Method, tmp_path: Path) -> None:
    """Loading builds for the sites in the file alone, and must choose the same ones from them."""
    backbone, inputs = fresh(model)
    delta = attach(backbone, method)
    shake(delta)
    with torch.no_grad():
        expected = output(backbone, inputs)
    save(delta, tmp_path / "saved")
    other, _ = fresh(model)
    load(other, tmp_path / "saved")
    assert trained(other) == trained(backbone)
    with torch.no_grad():
        assert torch.equal(output(other, inputs), expected)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_fields_out_of_range(value: float) -> None:
    with pytest.raises(InvalidValue, match=r"LastLayers\(portion=.*must be greater than 0 and at most 1"):
        LastLayers(portion=value)
    with pytest.raises(InvalidValue, match=r"SelectiveModules\(budget="):
        SelectiveModules(budget=value)
