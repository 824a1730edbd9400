"""Gradient checkpointing, both ways of it: every delta gets the gradients it gets without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltatune.injection.attach import attach
from deltatune.injection.delta import Delta
from deltatune.methods import DiffPruning, LoRA
from deltatune.methods.kinds import Stochastic
from tests.conformance.cells import TAKEN, Cell, fresh, moved, shake
from tests.conformance.sample import pairwise
from tests.models import HIDDEN, MODELS, output

WITHOUT = frozenset({"mpnet", "torch_encoder", "conv_net", "mlp", "tied_mlp"})
"""MPNet's layers do not checkpoint; the others are not transformers'."""
CHECKPOINTED = pairwise(cell for cell in TAKEN if cell.model not in WITHOUT)


def _gradients(backbone: nn.Module, inputs: dict[str, Tensor], delta: Delta) -> tuple[Tensor, list[Tensor]]:
    backbone.zero_grad()
    found = output(backbone, inputs)
    found.float().square().mean().backward()
    return found.detach(), [p.grad.clone() for p in delta.trained_parameters().values() if p.grad is not None]


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    scale = max(float(gradient.abs().max()) for gradient in expected)
    return len(found) == len(expected) and all(
        float((one - other).abs().max()) <= 5e-5 * scale for one, other in zip(found, expected, strict=True)
    )


def checkpoint_layers(backbone: Any, reentrant: bool) -> None:
    """Layers checkpoint in training mode only; their dropouts stay in evaluation mode."""
    kwargs = {"use_reentrant": reentrant}
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name in the lower end of our range
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if reentrant:
        backbone.enable_input_require_grads()
    layers = [module for module in backbone.modules() if hasattr(module, "gradient_checkpointing")]
    assert layers
    for layer in layers:
        layer.training = True
        for name in [name for name, value in vars(layer).items() if "dropout" in name and isinstance(value, float)]:
            setattr(layer, name, 0.0)


def test_all_that_checkpoint_are_there() -> None:
    assert {cell.model for cell in CHECKPOINTED} == MODELS.keys() - WITHOUT
    assert {cell.method for cell in CHECKPOINTED} == {cell.method for cell in TAKEN}


def _trains_relative_positions(delta: Delta) -> bool:
    """All layers of DeBERTa share that graph, which the reentrant way frees at the first."""
    return any(entry.site.path.startswith(("deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm")) for entry in delta.entries)


@pytest.mark.parametrize("cell", CHECKPOINTED, ids=str)
def test_gradients_are_those_without(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    delta = cell.attach(backbone)
    shake(delta)
    expected = _gradients(backbone, inputs, delta)
    for reentrant in (False, True):
        checkpoint_layers(backbone, reentrant)
        if reentrant and cell.model == "deberta_v2" and _trains_relative_positions(delta):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                _gradients(backbone, inputs, delta)
            continue
        found = _gradients(backbone, inputs, delta)
        assert moved(found[0], expected[0]) < 1e-5, f"reentrant={reentrant}"
        assert _equal(found[1], expected[1]), f"reentrant={reentrant}"


def test_reentrant_deberta_cannot_train_its_relative_positions_without_us_either() -> None:
    backbone, inputs = fresh("deberta_v2")
    checkpoint_layers(backbone, reentrant=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output(backbone, inputs).square().mean().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_random_draws_are_the_same_when_recomputed(reentrant: bool) -> None:
    results = []
    for checkpointed, seed in ((False, 0), (False, 1), (True, 0)):
        backbone, inputs = fresh("bert")
        delta = attach(backbone, DiffPruning(alpha_init=0.0))
        shake(delta, spread=0.2)
        backbone.training = True  # it draws; its dropouts rest
        for patch in delta.patches:
            patch.train()
        assert sum(isinstance(patch, Stochastic) for patch in delta.patches) > 10
        if checkpointed:
            checkpoint_layers(backbone, reentrant)
            backbone.enable_input_require_grads()  # type: ignore[operator]
        torch.manual_seed(seed)
        results.append(_gradients(backbone, inputs, delta))
    expected, other, found = results
    assert not torch.equal(other[0], expected[0])
    assert torch.equal(found[0], expected[0])
    assert _equal(found[1], expected[1])


class Stack(nn.Module):
    """Layers that hold raw parameters themselves, each checkpointed as a whole."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Layer(nn.Module):
    """tanh(x W) with W read by the layer itself, and a linear map behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.W))


@pytest.mark.parametrize("method", [DiffPruning(), LoRA(rank=2)], ids=["diff-pruning", "lora"])
def test_parameters_of_a_checkpointed_layer_itself(method: DiffPruning | LoRA) -> None:
    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        backbone = Stack(reentrant).eval()
        x = torch.randn(3, HIDDEN, requires_grad=True)
        delta = attach(backbone, method, ["layers.*.W", "layers.*.out"])
        shake(delta)
        results.append(_gradients(backbone, {"x": x}, delta))
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert _equal(found[1], results[0][1])
