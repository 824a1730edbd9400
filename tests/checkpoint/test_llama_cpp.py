"""LoRA files of llama.cpp, run in llama.cpp itself: SmolLM2's log-probabilities with a delta, there and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune.backbones import backbones, load_backbone, load_tokenizer
from deltatune.checkpoint.gguf_lora import write_gguf_lora
from deltatune.methods import LoRA
from tests.checkpoint.deltas import trained

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="xllamacpp, a binding of llama.cpp, is not installed")

pytestmark = pytest.mark.skipif(not backbones["smollm2-135m"].is_installed, reason="the package with SmolLM2's weights is not installed")

PROMPT = "The capital of France is"
LAYERS = 2
METHOD = LoRA(rank=4, alpha=16, ranks=(("attention.value", 3),))


def unquantised(weights: Path, file: Path, layers: int) -> Path:
    """The first layers of a GGUF with every tensor in fp32."""
    source = gguf.GGUFReader(weights)
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value = layers if name == "llama.block_count" else field.contents()
        item = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=item)
    for tensor in source.tensors:
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(block) < layers:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def theirs(weights: Path, ids: list[int], lora: Path | None) -> Tensor:
    """llama.cpp's log-probabilities (vocabulary,) of the token after ``ids``."""
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = str(weights), 64, 1, False
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fp16
    params.verbosity = 0
    if lora is not None:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    size = len(load_tokenizer("smollm2-135m"))
    said: Any = llama_cpp.Server(params).handle_completions({"prompt": ids, "max_tokens": 1, "logprobs": size, "temperature": 0.0})
    found = torch.full((size,), float("nan"))
    for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    assert not found.isnan().any()
    return found


def both(model: Any, weights: Path, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ours and llama.cpp's log-probabilities, of the plain model and with a delta."""
    ids = load_tokenizer("smollm2-135m")(PROMPT)["input_ids"]
    found = []
    for lora in (None, folder / "d.gguf"):
        if lora is not None:
            write_gguf_lora(trained(model, METHOD, where=["attention.*", "feed_forward.*"]), lora)
        with torch.no_grad():
            found += [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1), theirs(weights, ids, lora)]
    plain, plain_theirs, moved, moved_theirs = found
    return plain, plain_theirs, moved, moved_theirs


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    """In fp32 the log-probabilities are the same to rounding, and the delta moves them by far more."""
    [weights] = backbones["smollm2-135m"].files
    model: Any = load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM")
    model.model.layers = model.model.layers[:LAYERS]
    plain, plain_theirs, moved, moved_theirs = both(model, unquantised(weights, tmp_path / "base.gguf", LAYERS), tmp_path)
    torch.testing.assert_close(plain_theirs, plain, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(moved_theirs, moved, atol=2e-3, rtol=1e-4)
    assert (moved - plain).abs().max() > 0.5


def test_on_the_quantised_file(tmp_path: Path) -> None:
    """The whole packaged model, whose activations llama.cpp rounds to 8 bits: the delta moves both in the same direction."""
    [weights] = backbones["smollm2-135m"].files
    plain, plain_theirs, moved, moved_theirs = both(load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM"), weights, tmp_path)
    assert plain_theirs.argmax() == plain.argmax()
    assert (plain - plain_theirs).norm() / plain.norm() < 0.05
    assert torch.nn.functional.cosine_similarity(moved - plain, moved_theirs - plain_theirs, dim=0) > 0.9
