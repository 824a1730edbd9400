"""``device_map`` offload: output kinds and virtual positions work, kinds that need the weights in memory refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltatune.errors import DeltaError
from deltatune.injection.attach import attach, detach
from deltatune.injection.delta import Delta
from deltatune.methods import LoRA
from deltatune.methods.kinds import SelectionPatch, WeightPatch
from tests.conformance.cells import TAKEN, Cell, fresh, moved, shake
from tests.conformance.sample import pairwise
from tests.models import output

MODELS = ("bert", "llama", "t5")
NEEDS_MEMORY = {"weight", "selection"}
CELLS = pairwise((cell for cell in TAKEN if cell.model in MODELS), ("method",), ("act", "model"))


def _offload(backbone: nn.Module) -> None:
    """Weights wait in CPU memory and are on the meta device between forwards, as with ``device_map``."""
    from accelerate import cpu_offload

    cpu_offload(backbone, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_offloaded_backbones(cell: Cell) -> None:
    backbone, inputs = cell.fresh()
    with torch.no_grad():
        plain = output(backbone, inputs)
        delta = cell.attach(backbone, head=False)
        shake(delta)
        expected, state = output(backbone, inputs), _clones(delta.state_dict())
        detach(delta)
    _offload(backbone)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    if _needs_memory(cell, delta):
        with pytest.raises(DeltaError, match=r"offloaded|meta device") as caught:
            delta = cell.attach(backbone, head=False)
            output(backbone, inputs)
        assert "Load the backbone" in str(caught.value)
        return
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)
    delta = cell.attach(backbone, head=False)
    delta.load_state_dict(state)
    found = output(backbone, inputs)
    assert moved(found.detach(), expected) < 1e-5
    found.float().square().mean().backward()
    assert all(parameter.grad is not None and not parameter.is_meta for parameter in delta.trained_parameters().values())
    detach(delta)
    with torch.no_grad():
        assert torch.equal(output(backbone, inputs), plain)


def _clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _needs_memory(cell: Cell, delta: Delta) -> bool:
    if type(cell.recipe).reads_weights:
        return True
    return type(cell.recipe).kind in NEEDS_MEMORY and any(isinstance(patch, WeightPatch | SelectionPatch) for patch in delta.patches)


def test_a_device_map_with_a_folder_on_disk(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    backbone, inputs = fresh("llama")
    with torch.no_grad():
        reference = attach(backbone, LoRA(rank=2), name="lora")
        shake(reference)
        expected, state = output(backbone, inputs), _clones(reference.state_dict())
        detach(reference)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    dispatch_model(backbone, device_map=device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert backbone.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    delta = attach(backbone, LoRA(rank=2), name="lora")
    delta.load_state_dict(state)
    found = output(backbone, inputs)
    assert moved(found.detach(), expected) < 1e-5
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
