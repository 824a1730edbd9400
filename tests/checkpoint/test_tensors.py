"""The tensor file is safetensors, to the byte, whatever the tensors are like."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from deltatune.checkpoint.tensors import DTYPES, not_finite, read_tensors, write_tensors
from deltatune.errors import CheckpointError, Unsupported


def some() -> dict[str, Tensor]:
    """One tensor of every type, and every odd layout."""
    torch.manual_seed(0)
    tensors = {f"type.{DTYPES[dtype]}": (torch.randn(3, 2) * 10).to(dtype) for dtype in DTYPES}
    base = torch.randn(4, 6)
    odd = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "naïve:name": torch.ones(1),
    }
    return tensors | odd | {"gradient": torch.randn(2, requires_grad=True)}


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = some()
    digest = write_tensors(tmp_path / "a", tensors)
    content = (tmp_path / "a").read_bytes()
    assert content == save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    assert digest == hashlib.sha256(content).hexdigest()
    assert write_tensors(tmp_path / "b", dict(reversed(tensors.items()))) == digest


def test_round_trip(tmp_path: Path) -> None:
    tensors = some()
    found = read_tensors(tmp_path / "a", write_tensors(tmp_path / "a", tensors))
    assert found.keys() == tensors.keys() == load_file(tmp_path / "a").keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(
            found[name].view(torch.uint8) if tensor.ndim else found[name],
            tensor.detach().contiguous().view(torch.uint8) if tensor.ndim else tensor,
        )


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.randn(4)
    found = read_tensors(tmp_path / "a", write_tensors(tmp_path / "a", {"a": base, "b": base, "c": base[:2]}))
    assert torch.equal(found["a"], base) and torch.equal(found["b"], base) and torch.equal(found["c"], base[:2])


def test_nothing_at_all(tmp_path: Path) -> None:
    assert read_tensors(tmp_path / "a", write_tensors(tmp_path / "a", {})) == {}


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")])
def test_what_cannot_be_stored(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(Unsupported, match="`x` cannot go into a delta file"):
        write_tensors(tmp_path / "a", {"x": tensor})
    assert not (tmp_path / "a").exists()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_tensors(tmp_path, "")


def test_not_finite() -> None:
    values = {
        "a": torch.tensor([1.0, float("nan")]),
        "b": torch.tensor([float("-inf")]),
        "c": torch.ones(1),
        "d": torch.ones(1, dtype=torch.int64),
    }
    assert not_finite(values) == ["a", "b"]
    assert not_finite({"e": torch.tensor([float("nan")]).to(torch.float8_e5m2)}) == ["e"]
