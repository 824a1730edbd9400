"""Whatever is done to the bytes of a delta, a load ends well or with an error of ours, and the backbone is as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.checkpoint.record import digest_of
from deltatune.errors import DeltaError
from deltatune.methods import LoRA, PrefixTuning
from tests.checkpoint.deltas import same, state, trained

ROUNDS = 300
ODD = (None, True, -1, 0, 10**9, 10**30, 1e300, "", "x" * 1000, "../..", "/etc", [], {}, [[]], ["a", "a"], {"": None}, "\ud800")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return dt.save(trained(plain(), LoRA(rank=2), where=["0", "2"]), tmp_path / "d")


def resealed(data: dict[str, Any]) -> bytes:
    """A record whose digest was changed along, whatever stands in it."""
    return json.dumps({**data, "digest": digest_of(data)}).encode()


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        span = draw.choice((1, 1, 4, 64))
        kind = draw.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + span]
        elif kind == 2:
            data[at:at] = data[at : at + span]
        else:
            data[at:at] = draw.randbytes(span)
    return bytes(data)


def values_changed(value: Any, draw: random.Random) -> Any:
    """One value somewhere in a JSON tree replaced, dropped or renamed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        kind = draw.randrange(6)
        rest = {name: inner for name, inner in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {key + "x": value[key]}
        return rest | {key: values_changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], values_changed(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def header_changed(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(values_changed(json.loads(content[8 : 8 + length]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def attempt(folder: Path) -> str:
    """What a load ends in; anything but an error of ours goes up."""
    model = plain()
    before = state(model)
    try:
        delta = dt.load(model, folder)
    except DeltaError as error:
        assert same(state(model), before) and len(list(model.modules())) == 4
        return type(error).__name__
    dt.detach(delta)
    return "loaded"


def test_bytes_of_the_record(saved: Path) -> None:
    content = (saved / "delta.json").read_bytes()
    ends = []
    for k in range(ROUNDS):
        (saved / "delta.json").write_bytes(bytes_changed(content, random.Random(k)))
        ends.append(attempt(saved))
    assert ends.count("CheckpointError") > ROUNDS / 2


def test_values_of_the_record(saved: Path) -> None:
    content = json.loads((saved / "delta.json").read_text())
    ends = []
    for k in range(ROUNDS):
        changed = values_changed(content, random.Random(k))
        (saved / "delta.json").write_bytes(resealed(changed) if isinstance(changed, dict) else json.dumps(changed).encode())
        ends.append(attempt(saved))
    assert ends.count("CheckpointError") > ROUNDS / 2


@pytest.mark.parametrize("change", [bytes_changed, header_changed])
@pytest.mark.parametrize("known", [True, False])
def test_tensors(saved: Path, change: Callable[[bytes, random.Random], bytes], known: bool) -> None:
    """With the digest in the record changed along (``known``), only the structure can tell."""
    content = (saved / "delta.safetensors").read_bytes()
    record = json.loads((saved / "delta.json").read_text())
    ends = []
    for k in range(ROUNDS):
        edited = change(content, random.Random(k))
        (saved / "delta.safetensors").write_bytes(edited)
        if known:
            record["tensors"]["sha256"] = hashlib.sha256(edited).hexdigest()
            (saved / "delta.json").write_bytes(resealed(record))
        ends.append(attempt(saved))
    assert ends.count("CheckpointError") > ROUNDS / (4 if known else 2)


def test_fields_of_a_method_with_shared_state(tmp_path: Path) -> None:
    from tests.checkpoint.deltas import backbone

    model, _ = backbone("bert")
    delta = trained(model, PrefixTuning(num_virtual_tokens=2, mid_dim=4))
    folder = dt.save(delta, tmp_path / "d", unfinished=True)
    dt.detach(delta)
    content = json.loads((folder / "delta.json").read_text())
    before, ends = state(model), set()
    for field in content["method"]["fields"]:
        for odd in ODD:
            data = json.loads(json.dumps(content))
            data["method"]["fields"][field] = odd
            (folder / "delta.json").write_bytes(resealed(data))
            with contextlib.suppress(DeltaError):
                dt.detach(dt.load(model, folder))
                ends.add((field, str(odd)))
            assert same(state(model), before)
    assert ends <= {
        (field, str(odd)) for field in ("reparameterization", "init_std", "placed") for odd in (True, 0, -1, 10**9, 10**30, 1e300)
    }


def test_nothing_outside_the_folder_is_read(saved: Path) -> None:
    secret = saved.parent / "secret"
    secret.mkdir()
    shutil.copy(saved / "delta.safetensors", secret)
    shutil.copy(saved / "delta.json", secret)
    data = json.loads((saved / "delta.json").read_text())
    for name in ("../secret", str(secret), ".", "a/../../../secret"):
        whole = {
            **data,
            "method": None,
            "tensors": None,
            "composition": {"how": "parallel", "weights": [1.0, 1.0], "members": [[name, ""], ["b", ""]]},
        }
        (saved / "delta.json").write_bytes(resealed(whole))
        with pytest.raises(DeltaError, match="names no delta"):
            dt.load(plain(), saved)
    (saved / "members").symlink_to(secret.parent)
    digest = hashlib.sha256((secret / "delta.json").read_bytes()).hexdigest()
    whole["composition"]["members"] = [["secret", digest], ["d", digest]]
    (saved / "delta.json").write_bytes(resealed(whole))
    with pytest.raises(DeltaError, match="is a link"):
        dt.load(plain(), saved)
