"""LoRA files of llama.cpp: its names and its order of rows, checked against a GGUF's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.checkpoint.gguf_lora import write_gguf_lora
from deltatune.errors import OutputError, Unsupported
from deltatune.methods import Adapter, LoRA
from tests.checkpoint.deltas import backbone, train, trained

gguf = pytest.importorskip("gguf")

EVERYWHERE = ["attention.*", "feed_forward.*"]


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a GGUF."""
    found = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in found.fields.items()}
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)).reshape(*map(int, reversed(tensor.shape))) for tensor in found.tensors}
    return keys, tensors


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter permutes queries and keys: row (h, j, i) goes to (h, i, j), j in {0, 1}."""
    size = weight.shape[0] // heads
    rows = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return weight[rows]


def test_names_shapes_and_order(tmp_path: Path) -> None:
    model, _ = backbone("llama")
    delta = trained(model, LoRA(rank=2, alpha=6, ranks=(("attention.value", 3),)), where=EVERYWHERE)
    before = {name: tensor.clone() for name, tensor in dt.backbone_state(model).items()}
    keys, tensors = read(write_gguf_lora(delta, tmp_path / "d.gguf"))
    assert (keys["general.type"], keys["adapter.type"], keys["general.architecture"]) == ("adapter", "lora", "llama")
    dt.merge(delta)
    after = model.state_dict()
    places = {"attn_q": ("self_attn.q_proj", 4), "attn_k": ("self_attn.k_proj", 2), "attn_v": ("self_attn.v_proj", 0)}
    places |= {"attn_output": ("self_attn.o_proj", 0), "ffn_up": ("mlp.up_proj", 0), "ffn_down": ("mlp.down_proj", 0)}
    places |= {"ffn_gate": ("mlp.gate_proj", 0)}
    for k in range(2):
        for theirs, (ours, heads) in places.items():
            A, B = (tensors.pop(f"blk.{k}.{theirs}.weight.lora_{part}") for part in "ab")
            change = after[f"model.layers.{k}.{ours}.weight"] - before[f"model.layers.{k}.{ours}.weight"]
            scale = keys["adapter.lora.alpha"] / B.shape[-1]  # as llama_adapter_lora reads it
            torch.testing.assert_close(scale * B @ A, interleaved(change, heads) if heads else change, atol=1e-5, rtol=1e-4)
    assert tensors == {}


def test_the_order_is_that_of_a_converted_backbone(tmp_path: Path) -> None:
    """transformers undoes the converter's permutation when it reads a GGUF: on W' = W + B A it must find what the delta makes of W."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    model, _ = backbone("llama")
    delta = trained(model, LoRA(rank=2), where=["attention.{query,key}"])
    keys, tensors = read(write_gguf_lora(delta, tmp_path / "d.gguf"))
    processor = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    W = dt.backbone_state(model)
    for name, heads, own in (("attn_q", 4, "q_proj"), ("attn_k", 2, "k_proj")):
        before = interleaved(W[f"model.layers.0.self_attn.{own}.weight"], heads)
        A, B = (tensors[f"blk.0.{name}.weight.lora_{part}"] for part in "ab")
        after = (before + keys["adapter.lora.alpha"] / B.shape[-1] * B @ A).numpy()
        undone = processor.process(weights=after, name=f"blk.0.{name}.weight").weights
        entry = next(entry for entry in delta.entries if entry.key == f"model.layers.0.self_attn.{own}")
        patch: Any = entry.patch
        expected, _ = patch.merge(W[f"model.layers.0.self_attn.{own}.weight"], None)
        torch.testing.assert_close(torch.from_numpy(np.array(undone)), expected, atol=1e-5, rtol=1e-4)


def test_the_same_bytes_and_no_overwriting(tmp_path: Path) -> None:
    delta = trained(backbone("llama")[0], LoRA(rank=2))
    first = write_gguf_lora(delta, tmp_path / "a.gguf").read_bytes()
    assert write_gguf_lora(delta, tmp_path / "deep" / "b.gguf").read_bytes() == first
    with pytest.raises(OutputError, match="overwrite=True"):
        write_gguf_lora(delta, tmp_path / "a.gguf")
    write_gguf_lora(delta, tmp_path / "a.gguf", overwrite=True)
    with pytest.raises(OutputError, match=r"one file called `\*.gguf`"):
        write_gguf_lora(delta, tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "deep"]


def test_what_llama_cpp_cannot_take(tmp_path: Path) -> None:
    for name, method, where, words in (
        ("bert", LoRA(rank=2), None, "sits on a `bert`"),
        ("llama", Adapter(bottleneck_dim=2), None, "has a .* at .*Convert it to lora first"),
        ("llama", LoRA(rank=2), ["embedding"], "llama.cpp takes low-rank changes of linear maps"),
    ):
        model, _ = backbone(name)
        with pytest.raises(Unsupported, match=words):
            write_gguf_lora(trained(model, method, where=where), tmp_path / "d.gguf")
    model, _ = backbone("llama")
    members = [train(dt.attach(model, LoRA(rank=1), name=f"m{k}")) for k in range(2)]
    with pytest.raises(Unsupported, match="is a composition"):
        write_gguf_lora(dt.compose(model, members, name="both"), tmp_path / "d.gguf")
    assert list(tmp_path.iterdir()) == []
