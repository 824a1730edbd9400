"""Ten thousand damaged files: only errors of ours come out of the loaders, the backbone is as it was, and memory is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltatune.checkpoint.header import read_header
from deltatune.checkpoint.tensors import MAX_HEADER
from deltatune.errors import CheckpointError

ROOT = Path(__file__).parents[2]
FILES = 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.checkpoint.mutated", str(FILES), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    told = json.loads(finished.stdout)
    assert sum(told["ends"].values()) == FILES
    assert sum(count for end, count in told["ends"].items() if end.startswith("CheckpointError")) > FILES / 2
    assert told["ends"]["loaded"] > 0
    assert told["grown"] < 192 * 2**20


def header(text: str, room: int = 0) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(room)


def one(dtype: object = "F32", shape: object = (2,), place: object = (0, 8)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": place}})


HEADERS: list[tuple[bytes, str]] = [
    (b"", "claims 0 for its header"),
    (b"12345678", "claims .* for its header"),
    ((MAX_HEADER + 1).to_bytes(8, "little") + bytes(MAX_HEADER + 1), "of which 16,777,216 are the most"),
    (header("[]"), "holds list instead of an object"),
    (header("{"), "is truncated or no safetensors file"),
    (header("[" * 100_000), "is truncated or no safetensors file"),
    (header('{"a": 1}'), "is not described by dtype"),
    (header('{"a": 1, "a": 2}'), "a key stands twice"),
    (header('{"__metadata__": {"a": 1}}'), "no table of strings"),
    (header(one(dtype="F31"), 8), "which does not exist"),
    (header(one(dtype=[]), 8), "which does not exist"),
    (header(one(shape=[2**62] * 4), 8), "does not fit its place"),
    (header(one(shape=[0, 2**63]), 8), "no sensible shape"),
    (header(one(shape=[1] * 100, place=(0, 4)), 8), "no sensible shape"),
    (header(one(shape=[-2]), 8), "no sensible shape"),
    (header(one(shape=[True]), 8), "no sensible shape"),
    (header(one(shape=[2.0]), 8), "no sensible shape"),
    (header(one(place=(0, 4)), 8), "does not fit its place"),
    (header(one(place=(8, 0)), 8), "does not fit its place"),
    (header(one(place=(4, 12)), 8), "does not fit its place"),
    (header(one(place=(0,)), 8), "no sensible shape or place"),
]


@pytest.mark.parametrize(("content", "words"), HEADERS, ids=[words for _, words in HEADERS])
def test_headers_that_cannot_be(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_header(tmp_path / "x.safetensors")


def test_a_header_with_too_many_tensors(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / "x.safetensors").write_bytes(header(json.dumps({f"{k}": empty for k in range(2**18 + 1)}, separators=(",", ":"))))
    with pytest.raises(CheckpointError, match=r"names 262,145 tensors|claims"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_is_read_alone(tmp_path: Path) -> None:
    """A file of a terabyte costs as much as its header."""
    size = 2**40
    text = json.dumps({"__metadata__": {"who": "me"}, "a": {"dtype": "BF16", "shape": [2**20, 2**19], "data_offsets": [0, size]}})
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(header(text))
        try:
            file.truncate(8 + len(text) + size)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    found = read_header(tmp_path / "x.safetensors")
    assert found.values_bytes == size and found.metadata == {"who": "me"}
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.tensors] == [("a", "BF16", (2**20, 2**19))]
