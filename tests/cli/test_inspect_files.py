"""``deltatune inspect FILE|DIR``: what files hold, whoever wrote them, and with no tensor loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltatune as dt
from deltatune.methods import LoRA
from tests.checkpoint.golden.write import HERE
from tests.cli.conftest import Call, refused

GOLDEN = HERE / "version-1"


def told(call: Call, place: Path) -> dict[str, Any]:
    done = call("inspect", place, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A LoRA folder that PEFT wrote."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def test_a_delta_folder_lists_its_tensors(call: Call) -> None:
    found = told(call, GOLDEN / "lora")
    [(name, header)] = found["files"].items()
    assert name == "delta.safetensors" and found["method"] == "lora"
    shapes = {tensor["name"]: (tensor["dtype"], tensor["shape"], tensor["size_bytes"]) for tensor in header["tensors"]}
    assert shapes["classifier.weight"] == ("F32", [3, 8], 96) and len(shapes) == 10
    shown = call("inspect", GOLDEN / "lora")
    line = next(line for line in shown.out.splitlines() if "query.lora_A" in line)
    assert line.split() == ["bert.encoder.layer.*.attention.self.query.lora_A", "F32", "2x8", "2", "128"]


def test_a_record_stands_for_its_folder(call: Call) -> None:
    assert told(call, GOLDEN / "lora" / "delta.json") == told(call, GOLDEN / "lora")


def test_a_composition_lists_those_of_its_members(call: Call) -> None:
    found = told(call, GOLDEN / "composition.gated")
    assert set(found["files"]) == {"delta.safetensors", "members/m0/delta.safetensors", "members/m1/delta.safetensors"}


def test_a_file_of_tensors(call: Call, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "x.safetensors", metadata={"who": "someone"})
    found = told(call, tmp_path / "x.safetensors")["files"]["x.safetensors"]
    assert found["metadata"] == {"who": "someone"}
    assert found["tensors"] == [
        {"name": "a", "dtype": "F32", "shape": [2, 3], "size_bytes": 24},
        {"name": "b", "dtype": "BF16", "shape": [], "size_bytes": 2},
    ]
    shown = call("inspect", tmp_path / "x.safetensors")
    assert "someone" in shown.out and "scalar" in shown.out and "2 tensors of 26 bytes" in shown.out


def test_a_folder_of_peft(call: Call, foreign: Path) -> None:
    found = told(call, foreign)
    assert found["format"] == "peft"
    assert found["configs"]["adapter_config.json"]["peft_type"] == "LORA"
    names = [tensor["name"] for tensor in found["files"]["adapter_model.safetensors"]["tensors"]]
    assert "base_model.model.0.lora_A.weight" in names and len(names) == 4
    shown = call("inspect", foreign)
    assert "a folder of peft" in shown.out and "peft_type" in shown.out and "base_model.model.*.lora_A.weight" in shown.out


def test_a_pickle_is_named_and_not_read(call: Call, foreign: Path) -> None:
    (foreign / "adapter_model.safetensors").unlink()
    (foreign / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    assert told(call, foreign)["pickles"] == {"adapter_model.bin": 26}
    assert "a pickle: reading one can run code, so it is not shown" in call("inspect", foreign).out


def test_no_tensor_is_loaded(call: Call, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tensor was loaded")

    for name, module in list(sys.modules.items()):
        if name.startswith("deltatune.checkpoint") and hasattr(module, "safe_open"):
            monkeypatch.setattr(module, "safe_open", loaded)
    monkeypatch.setattr(torch, "load", loaded)
    told(call, foreign)
    told(call, GOLDEN / "composition.gated")


def test_what_cannot_be_shown(call: Call, tmp_path: Path, foreign: Path) -> None:
    refused(call("inspect", tmp_path / "nowhere"), "There is no delta in")
    (tmp_path / "notes.txt").write_text("hello")
    refused(call("inspect", tmp_path / "notes.txt"), "holds no delta and no tensors that can be shown (found: notes.txt)")
    shutil.copytree(GOLDEN / "lora", tmp_path / "deltas" / "one")
    refused(call("inspect", tmp_path / "deltas"), "Deltas are in", "deltas/one")
    weights = foreign / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(call("inspect", foreign), "does not fit its place")
    weights.write_bytes((2**50).to_bytes(8, "little") + b"{}")
    refused(call("inspect", weights), "claims 1,125,899,906,842,624 for its header")
    weights.unlink()
    weights.symlink_to(GOLDEN / "lora" / "delta.safetensors")
    refused(call("inspect", weights), "is a link")
    (foreign / "adapter_config.json").write_text("[1]")
    refused(call("inspect", foreign), "holds list instead of an object")
    assert "Traceback" in call("inspect", weights, "--debug").err


def test_a_delta_with_a_damaged_file(call: Call, tmp_path: Path) -> None:
    delta = dt.attach(nn.Sequential(nn.Linear(4, 2)), LoRA(rank=1), where="0", name="d")
    folder = dt.save(delta, tmp_path / "d")
    (folder / "delta.safetensors").write_bytes(b"")
    refused(call("inspect", folder), "is truncated or no safetensors file")
