"""Files of every format version so far load, and act as they did when they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint import record as records
from deltatune.checkpoint.record import FORMAT_VERSION, sealed
from deltatune.errors import CheckpointError
from deltatune.methods.kinds import methods
from tests.checkpoint.golden.write import BACKBONES, HERE, cases, outputs

FOLDERS = sorted(file.parent for file in HERE.glob("version-*/*/delta.json"))


def fresh(name: str) -> nn.Module:
    backbone, _, kind = name.partition("-")
    return BACKBONES[backbone]().to(torch.bfloat16 if kind == "bf16" else torch.float32)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_loads_for_ever(folder: Path) -> None:
    told = json.loads((folder / "outputs.json").read_text())
    model = fresh(told["backbone"])
    plain = outputs(model)
    loaded = dt.load(model, folder)
    expected = torch.tensor(told["outputs"])
    bound = 2e-2 if told["backbone"].endswith("bf16") else 1e-5
    torch.testing.assert_close(outputs(model), expected, atol=bound, rtol=bound)
    assert torch.allclose(plain, expected, atol=bound, rtol=bound) == (folder.name == "frozen")
    dt.detach(loaded)
    assert torch.equal(outputs(model), plain)


def test_every_method_has_its_file() -> None:
    """One that is new: ``python -m tests.checkpoint.golden.write``."""
    written = {folder.name for folder in FOLDERS if folder.parent.name == f"version-{FORMAT_VERSION}"}
    assert written >= {name for name, _, _ in cases()} >= set(methods)


def test_files_are_small() -> None:
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in FOLDERS]
    assert max(sizes) < 32 * 1024 and sum(sizes) < 1024 * 1024


def older(data: dict[str, Any]) -> dict[str, Any]:
    """As a version 0 might have been: another name for the sites, no ``exported``, the method in one string."""
    method = data.pop("method")
    old = {key: value for key, value in data.items() if key not in ("sites", "exported", "digest")}
    return old | {"format_version": 0, "places": data["sites"], "recipe": f"{method['name']}({json.dumps(method['fields'])})"}


def newer(data: dict[str, Any]) -> dict[str, Any]:
    """Version 0 -> 1."""
    name, _, fields = data.pop("recipe").partition("(")
    return data | {"sites": data.pop("places"), "exported": None, "method": {"name": name, "fields": json.loads(fields[:-1])}}


def test_a_migration_brings_an_old_record_to_the_current_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = HERE / f"version-{FORMAT_VERSION}" / "lora"
    for file in current.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "delta.json").write_bytes(sealed(older(json.loads((current / "delta.json").read_text()))))
    with pytest.raises(CheckpointError, match="format version 0, which never was"):
        read(tmp_path)
    monkeypatch.setitem(records.MIGRATIONS, 0, newer)
    assert read(tmp_path) == read(current)
    model = fresh("bert")
    dt.load(model, tmp_path)
    expected = torch.tensor(json.loads((current / "outputs.json").read_text())["outputs"])
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)


def test_an_old_record_is_still_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = HERE / f"version-{FORMAT_VERSION}" / "lora"
    monkeypatch.setitem(records.MIGRATIONS, 0, newer)
    data = older(json.loads((current / "delta.json").read_text()))
    (tmp_path / "delta.json").write_bytes(sealed(data | {"stranger": 1}))
    with pytest.raises(CheckpointError, match="does not know: `stranger`"):
        read(tmp_path)
    (tmp_path / "delta.json").write_text(json.dumps(json.loads(sealed(data)) | {"name": "other"}))
    with pytest.raises(CheckpointError, match="was edited"):
        read(tmp_path)
