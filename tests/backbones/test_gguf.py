from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file

from deltatune.backbones import backbone_id, backbones, load_backbone, load_config, load_tokenizer
from deltatune.compiled.cache import cache_folder
from deltatune.errors import CheckpointError, OutputError
from tests.backbones.conftest import write_gguf


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "backbones").iterdir())


def test_conversion(tiny: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backbone, tokenizer = load_backbone(tiny, auto_class="AutoModelForCausalLM"), load_tokenizer(tiny)
    assert capfd.readouterr() == ("", "")
    (name,) = folders(cache)
    assert name.startswith("tiny-")
    config = json.loads((cache / "backbones" / name / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["dtype"] == "float32" and "quantization_config" not in config
    assert not any(str(tiny.parent) in file.read_text() for file in (cache / "backbones" / name).glob("*.json"))
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.model_max_length == 64 and backbone.config.pad_token_id == 2
    assert tokenizer.decode(tokenizer("he says so").input_ids) == "he says so"


def test_weights_are_those_of_the_file(tiny: Path, cache: Path) -> None:
    backbone = load_backbone(tiny, auto_class="AutoModelForCausalLM")
    stored = {tensor.name: torch.from_numpy(numpy.array(tensor.data)) for tensor in gguf.GGUFReader(tiny).tensors}
    state = backbone.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
    # llama.cpp interleaves the two halves of the rotary pairs: rows (head, pair, half) there, (head, half, pair) here
    query = stored["blk.0.attn_q.weight"].view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], query)


def test_converted_once(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tokenizer(tiny)
    monkeypatch.setattr("deltatune.backbones.gguf._convert", None)
    load_tokenizer(tiny)
    assert len(folders(cache)) == 1


def test_another_file_is_another_folder(tiny: Path, cache: Path) -> None:
    load_tokenizer(tiny)
    write_gguf(tiny, seed=1)
    load_tokenizer(tiny)
    assert len(folders(cache)) == 2


def test_two_processes_at_once(tiny: Path, cache: Path) -> None:
    program = f"from deltatune.backbones import load_tokenizer; print(load_tokenizer({str(tiny)!r}).eos_token)"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=200)[0] for process in processes] == ["</s>\n", "</s>\n"]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("kept", [3, 100, 4000, 60000])
def test_a_truncated_file_leaves_nothing(tiny: Path, cache: Path, kept: int) -> None:
    tiny.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"`tiny.gguf`.*(truncated|not a GGUF file)"):
        load_backbone(tiny)
    assert folders(cache) == []


def test_a_full_disk_leaves_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deltatune.backbones.gguf._convert", full)
    with pytest.raises(OutputError, match=r"No space left on device.*DELTATUNE_CACHE"):
        load_tokenizer(tiny)
    assert folders(cache) == []


def test_a_cache_that_cannot_be_made(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="name a folder you can write to in DELTATUNE_CACHE"):
        load_tokenizer(tiny)


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DELTATUNE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "deltatune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/deltatune")


def test_chunks_in_several_packages(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gemma3-270m is packaged: four distributions with a piece of the file each."""
    data, entry = tiny.read_bytes(), backbones["gemma3-270m"]
    step = len(data) // 4 + 1
    monkeypatch.syspath_prepend(str(tmp_path))
    for part, package in enumerate(entry.packages):
        assert package.location is None
        file = tmp_path / package.module / package.path
        file.parent.mkdir(parents=True)
        (tmp_path / package.module / "__init__.py").write_text("")
        file.write_bytes(data[part * step : (part + 1) * step])
    assert entry.is_installed
    chunked = load_backbone("gemma3-270m", auto_class="AutoModelForCausalLM").state_dict()
    whole = load_backbone(tiny, auto_class="AutoModelForCausalLM").state_dict()
    assert all(torch.equal(chunked[name], whole[name]) for name in whole)
    assert sorted(name.split("-")[0] for name in folders(cache)) == ["gemma3", "tiny"]
    assert backbone_id(load_config("gemma3-270m").name_or_path) == "gemma3-270m"


PASSAGE = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the engineer "
    "Gustave Eiffel, whose company designed and built the tower from 1887 to 1889 for the World's Fair."
)


@pytest.mark.slow
def test_smollm2_speaks(converted_smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(converted_smollm2))
    backbone, tokenizer = load_backbone("smollm2-135m", auto_class="AutoModelForCausalLM"), load_tokenizer("smollm2-135m")
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 134_515_008
    assert backbone.lm_head.weight is backbone.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192 and tokenizer("Hello world").input_ids == [19556, 905]

    ids = tokenizer(PASSAGE, return_tensors="pt").input_ids
    with torch.no_grad():
        assert backbone(input_ids=ids, labels=ids).loss.item() < 2.5  # 2.0 nats; 10.8 for a random model
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_end|>\n<|im_start|>assistant\n")
    batch = tokenizer(chat, return_tensors="pt")
    answer = backbone.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

    (folder,) = (converted_smollm2 / "backbones").iterdir()
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32} and "lm_head.weight" not in weights
    source = gguf.GGUFReader(backbones["smollm2-135m"].files[0])
    norm = next(tensor for tensor in source.tensors if tensor.name == "blk.7.ffn_down.weight")
    expected = gguf.dequantize(norm.data, norm.tensor_type)
    assert numpy.array_equal(weights["model.layers.7.mlp.down_proj.weight"].numpy(), expected)
