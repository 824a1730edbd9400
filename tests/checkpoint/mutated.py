"""Loads thousands of damaged delta files, ours and other libraries', under a limit of memory.

``python -m tests.checkpoint.mutated COUNT FOLDER``

Prints how the loads ended, and the most memory they took beyond what the process had before. Anything but an error of
ours ends it.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import deltatune as dt
from deltatune.checkpoint import read
from deltatune.checkpoint.header import read_header
from deltatune.checkpoint.record import digest_of, sealed
from deltatune.errors import DeltaError
from deltatune.methods import BitFit, LoRA, RandomSubset
from tests.checkpoint.deltas import same, state, train
from tests.checkpoint.test_fuzz import bytes_changed, header_changed, plain, values_changed

ROOM = 512 * 2**20
"""Bytes of address space beyond what is there when the loads begin; 64 MiB are what building may always take."""

Change = Callable[[bytes, random.Random], bytes]


def config_changed(content: bytes, draw: random.Random) -> bytes:
    """A config that says something else."""
    return json.dumps(values_changed(json.loads(content), draw)).encode()


def record_changed(content: bytes, draw: random.Random) -> bytes:
    """A record that says something else, and whose digest fits what it says."""
    changed = values_changed(json.loads(content), draw)
    return json.dumps({**changed, "digest": digest_of(changed)} if isinstance(changed, dict) else changed).encode()


def nested(content: bytes, draw: random.Random) -> bytes:
    """A record with a value as deep as JSON parsers dare to go, or deeper."""
    depth = draw.choice((400, 900, 990, 1000, 5000, 100_000))
    return content.replace(b'"data": null', b'"data": ' + b"[" * depth + b"]" * depth)


def whole_changed(content: bytes, draw: random.Random) -> bytes:
    """Something else altogether."""
    return draw.choice((b"", b"{}", b"null", b"\0" * 64, draw.randbytes(200), b"\x80\x04" + content, b"PK\x03\x04" + content))


def saved(folder: Path) -> list[Path]:
    """A delta, one by differences, one of sparse values, and a composition with a mixer."""
    places = []
    for name, method in (("lora", LoRA(rank=2)), ("bias", BitFit()), ("sparse", RandomSubset(density=0.2))):
        places.append(dt.save(train(dt.attach(plain(), method, where=["0", "2"], name=name)), folder / name))
    model = plain()
    members = [train(dt.attach(model, LoRA(rank=1), where=["0", "2"], name=f"m{k}"), seed=k) for k in range(2)]
    return [*places, dt.save(dt.compose(model, members, "gated", name="both"), folder / "both")]


def foreign(folder: Path) -> list[Path]:
    """A LoRA as PEFT, OpenDelta and adapters store it."""
    delta = train(dt.attach(plain(), LoRA(rank=2), where=["0", "2"], name="lora"))
    tensors = {name: tensor.detach() for name, tensor in delta.state_dict().items()}
    others = {
        "opendelta": (
            "config.json",
            "model.safetensors",
            "{}.lora.{}",
            {"delta_type": "lora", "lora_r": 2, "lora_alpha": 16, "data": None},
        ),
        "adapters": (
            "adapter_config.json",
            "adapter.safetensors",
            "{}.loras.x.{}",
            {"name": "x", "version": "adapters.1.3.0", "config": {"architecture": "lora", "r": 2, "alpha": 16, "attn_matrices": ["q"]}},
        ),
    }
    for name, (config, weights, form, said) in others.items():
        (folder / name).mkdir()
        (folder / name / config).write_text(json.dumps(said))
        save_file({form.format(*key.split(".")): tensor for key, tensor in tensors.items()}, folder / name / weights)
    return [dt.save(delta, folder / "peft", format="peft"), *(folder / name for name in others)]


def attempt(model: nn.Module, before: dict[str, Any], folder: Path) -> str:
    """What a load ends in; whatever it is, the backbone is as it was."""
    end = "loaded"
    try:
        dt.detach(dt.load(model, folder))
    except DeltaError as error:
        end = type(error).__name__
    assert same(state(model), before) and len(list(model.modules())) == 4
    try:
        read(folder)
        for file in folder.rglob("*.safetensors"):
            read_header(file)
    except DeltaError:
        end += " (and not shown)"
    return end


def mutate(place: Path, draw: random.Random) -> Callable[[], None]:
    """Damage one file of a saved delta; returns what repairs it."""
    file = draw.choice(sorted(path for path in place.rglob("*") if path.is_file()))
    content = file.read_bytes()
    if file.suffix == ".json":
        said = record_changed if file.name == "delta.json" else config_changed
        change: Change = draw.choice((bytes_changed, said, said, said, nested, whole_changed))
        _write(file, change(content, draw))
        return lambda: _write(file, content)
    change = draw.choice((bytes_changed, header_changed, header_changed, whole_changed))
    _write(file, change(content, draw))
    record = file.with_name("delta.json")
    if not record.exists():
        return lambda: _write(file, content)
    before = record.read_bytes()
    if draw.random() < 0.8:  # whoever edits a file on purpose edits its digest as well
        data = json.loads(before)
        data["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        _write(record, sealed(data))
    return lambda: (_write(file, content), _write(record, before))[0]


def _write(file: Path, content: bytes) -> None:
    """A new file: where an old one is cut short, some file systems wait for the disk."""
    file.unlink()
    file.write_bytes(content)


def main(count: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    places = [*saved(folder), *foreign(folder)]
    model = plain()
    before = state(model)
    attempt(model, before, places[0])
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    for k in range(count):
        draw = random.Random(k)
        place = places[k % len(places)]
        repair = mutate(place, draw)
        try:
            ends[attempt(model, before, place)] += 1
        except BaseException:
            print(f"file {k} of {place.name}", file=sys.stderr)
            raise
        repair()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    print(json.dumps({"ends": ends, "grown": grown}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
