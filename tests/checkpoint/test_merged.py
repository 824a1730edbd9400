"""A merged checkpoint is a plain one: it loads without this library, and computes what the delta on its backbone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.backbones.dequantize import dequantize_in_place
from deltatune.backbones.quantize import quantize_in_place
from deltatune.checkpoint.merged import write_merged
from deltatune.errors import OutputError, Unsupported
from deltatune.methods import Adapter, LoRA
from deltatune.methods.kinds import methods
from tests.checkpoint.deltas import backbone, same, small, state, train, trained
from tests.conformance.cells import MERGING
from tests.models import output

CELLS = [cell for cell in MERGING if cell.model == "bert"] + [
    cell
    for cell in MERGING
    if cell.model in ("gpt2", "t5", "llama", "mixtral") and cell.method in ("lora", "full", "bitfit", "dora", "ia3")
]


def opened(model: Any, folder: Path) -> nn.Module:
    """As anyone would load it."""
    found: nn.Module = type(model).from_pretrained(folder)
    return found.eval()


def found(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_equals_the_unmerged_model(cell: Any, tmp_path: Path) -> None:
    model, inputs = backbone(cell.model, head=1)
    plain, names = state(model), [name for name, _ in model.named_modules()]
    delta = trained(model, cell.method)
    expected, before = found(model, inputs), state(model)
    write_merged(delta, tmp_path / "m")
    assert same(state(model), before) and torch.equal(found(model, inputs), expected)
    torch.testing.assert_close(found(opened(model, tmp_path / "m"), inputs), expected, atol=2e-5, rtol=1e-4)
    assert not any(b"deltatune" in file.read_bytes() for file in (tmp_path / "m").iterdir())
    dt.detach(delta)
    assert same(state(model), plain) and [name for name, _ in model.named_modules()] == names


LOADED = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
inputs = {name: torch.tensor(value) for name, value in json.load(open(sys.argv[2])).items()}
with torch.no_grad():
    print(json.dumps(model(**inputs).logits.tolist()))
assert not any(name.split(".")[0] in ("deltatune", "peft") for name in sys.modules)
"""


def test_loads_in_a_fresh_process_without_this_library(tmp_path: Path) -> None:
    model, inputs = backbone("bert", head=1)
    delta = trained(model, "lora")
    write_merged(delta, tmp_path / "m")
    (tmp_path / "inputs.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}))
    words = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / "m"), str(tmp_path / "inputs.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    logits = torch.tensor(json.loads(finished.stdout.splitlines()[-1]))
    torch.testing.assert_close(logits, found(model, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adapter", "prefix-tuning", "prompt-tuning", "ladder-side-tuning", "loreft"])
def test_kinds_that_cannot_merge(name: str, tmp_path: Path) -> None:
    model, _ = backbone("bert")
    delta = trained(model, name)
    before = state(model)
    with pytest.raises(Unsupported, match="cannot be merged"):
        write_merged(delta, tmp_path / "m")
    assert same(state(model), before) and list(tmp_path.iterdir()) == []


def test_compositions(tmp_path: Path) -> None:
    model, inputs = backbone("bert", head=1)
    members = [train(dt.attach(model, small(name), name=name, head=k == 0), seed=k) for k, name in enumerate(("lora", "ia3"))]
    composition = dt.compose(model, members, name="both")
    expected, before = found(model, inputs), state(model)
    write_merged(composition, tmp_path / "m")
    assert same(state(model), before) and composition.enabled and torch.equal(found(model, inputs), expected)
    torch.testing.assert_close(found(opened(model, tmp_path / "m"), inputs), expected, atol=2e-5, rtol=1e-4)
    composition.dissolve()
    weighted = dt.compose(model, members, "weighted", weights=(0.5, 0.5), name="w")
    with pytest.raises(Unsupported, match="how='weighted' is no sequence"):
        write_merged(weighted, tmp_path / "n")


def test_what_else_acts_or_rests(tmp_path: Path) -> None:
    model, _ = backbone("bert")
    lora = trained(model, LoRA(rank=2))
    other = dt.attach(model, Adapter(bottleneck_dim=2), name="other", head=False)
    with pytest.raises(Unsupported, match="`other` acts beside `d`"):
        write_merged(lora, tmp_path / "m")
    other.disable()
    write_merged(lora, tmp_path / "m")
    with pytest.raises(OutputError, match="exists already"):
        write_merged(lora, tmp_path / "m")
    write_merged(lora, tmp_path / "m", overwrite=True)
    lora.disable()
    with pytest.raises(Unsupported, match="disabled, so there is nothing to merge"):
        write_merged(lora, tmp_path / "n")


def test_one_that_is_merged_already_stays_so(tmp_path: Path) -> None:
    model, inputs = backbone("bert")
    delta = trained(model, "lora")
    dt.merge(delta)
    write_merged(delta, tmp_path / "m")
    assert delta.merged
    torch.testing.assert_close(found(opened(model, tmp_path / "m"), inputs), found(model, inputs), atol=1e-6, rtol=1e-5)


def test_a_backbone_of_no_library(tmp_path: Path) -> None:
    delta = dt.attach(nn.Sequential(nn.Linear(4, 2)), LoRA(rank=1), "0", name="d")
    with pytest.raises(Unsupported, match="has no `save_pretrained`"):
        write_merged(delta, tmp_path / "m")


def test_half_precision(tmp_path: Path) -> None:
    model, inputs = backbone("llama", dtype=torch.bfloat16)
    delta = trained(model, "lora")
    write_merged(delta, tmp_path / "m")
    again = opened(model, tmp_path / "m")
    assert next(again.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(found(again, inputs), found(model, inputs), atol=5e-2, rtol=5e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("scheme", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantised_backbone_refuses_or_is_dequantised(scheme: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    model, inputs = backbone("llama")
    full = found(model, inputs)
    assert quantize_in_place(model, scheme) > 8
    quantised = found(model, inputs)
    delta = trained(model, "lora")
    expected = found(model, inputs)
    with pytest.raises(Unsupported, match="quantising the merged weight again would lose the delta"):
        write_merged(delta, tmp_path / "m")
    tensors = delta.state_dict()
    dt.detach(delta)
    assert dequantize_in_place(model) > 8 and dequantize_in_place(model) == 0
    torch.testing.assert_close(found(model, inputs), quantised, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found(model, inputs), full, atol=1e-4)
    again = dt.attach(model, small("lora"), name="d")
    again.load_state_dict(tensors)
    write_merged(again, tmp_path / "m")
    torch.testing.assert_close(found(opened(model, tmp_path / "m"), inputs), expected, atol=1e-4, rtol=1e-3)


def test_every_method_merges_or_says_why(tmp_path: Path) -> None:
    """On BERT; the ones that merge are compared above."""
    merging = {cell.method for cell in CELLS if cell.model == "bert"}
    for name in sorted(methods):
        if name in merging or not methods[name].trains:
            continue
        delta = trained(backbone("bert")[0], name)
        with pytest.raises(Unsupported, match="cannot be merged"):
            write_merged(delta, tmp_path / name)
