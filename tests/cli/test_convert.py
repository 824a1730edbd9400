"""``deltatune convert`` and ``deltatune merge``, from end to end on a run of a tiny backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltatune as dt
from deltatune.methods import LoRA
from tests.cli.conftest import Call, refused
from tests.training.tiny import folder, rows

TEXTS = [str(text) for text in rows(4, seed=9)["text"]]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    return found


def opened(place: Path) -> torch.Tensor:
    backbone, tokenizer, _ = dt.open(place)
    return logits(backbone, tokenizer)


def told(call: Call, *words: object) -> dict[str, Any]:
    done = call("convert", *words, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_merged_loads_with_transformers_alone(call: Call, finished: Path, tmp_path: Path) -> None:
    assert call("merge", finished, tmp_path / "m").code == 0
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(model, tokenizer), opened(finished), atol=1e-5, rtol=1e-4)
    assert list(model.config.id2label.values()) == list(dt.open(finished)[0].config.id2label.values())
    again = told(call, finished, tmp_path / "n", "--to", "merged")
    assert again["to"] == "merged" and again["size_bytes"] > 1000
    assert (tmp_path / "n" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()
    refused(call("merge", finished, tmp_path / "m"), "exists already")
    assert call("merge", finished, tmp_path / "m", "--overwrite").code == 0


def test_native_again(call: Call, finished: Path, tmp_path: Path) -> None:
    told(call, finished, tmp_path / "d", "--to", "native")
    for name in ("delta.json", "delta.safetensors"):
        assert (tmp_path / "d" / name).read_bytes() == (finished / "delta" / name).read_bytes()


def test_lora_of_lora_is_exact(call: Call, finished: Path, tmp_path: Path) -> None:
    found = told(call, finished, tmp_path / "l", "--to", "lora", "--rank", 8)
    assert found["relative_error"] < 1e-5 and found["left_out"] == [] and len(found["errors"]) == 4
    torch.testing.assert_close(opened(tmp_path / "l"), opened(finished), atol=1e-5, rtol=1e-4)
    shown = call("convert", finished, tmp_path / "k", "--to", "lora", "--rank", 1)
    assert "relative error" in shown.out and "of the change" in shown.out and "worst matrix" in shown.out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_and_back(call: Call, finished: Path, encoder: str, tmp_path: Path) -> None:
    told(call, finished, tmp_path / "p", "--to", "peft")
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=dt.open(finished)[0].config.num_labels)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "p")
    torch.testing.assert_close(logits(theirs, AutoTokenizer.from_pretrained(encoder)), opened(finished), atol=1e-5, rtol=1e-4)
    told(call, tmp_path / "p", tmp_path / "d", "--to", "native", "--backbone", encoder, "--num-labels", base.config.num_labels)
    torch.testing.assert_close(opened(tmp_path / "d"), opened(finished), atol=1e-5, rtol=1e-4)


def test_fields_that_only_matter_in_training_may_be_left_out(call: Call, finished: Path, encoder: str, tmp_path: Path) -> None:
    told(call, finished, tmp_path / "p", "--to", "peft")
    config = tmp_path / "p" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "some_new_field": 5}))
    words = [tmp_path / "p", tmp_path / "q", "--to", "native", "--backbone", encoder]
    refused(call("convert", *words), "some_new_field = 5")
    told(call, *words, "--allow-unknown")
    refused(call("convert", finished, tmp_path / "r", "--to", "native", "--allow-unknown"), "is one of ours")


def test_gguf_lora(call: Call, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    place = folder("llama", tmp_path / "backbones")
    from deltatune.backbones import load_backbone

    model = load_backbone(place, auto_class="AutoModelForCausalLM")
    dt.save(dt.attach(model, LoRA(rank=2), name="d"), tmp_path / "d", backbone_id=place)
    told(call, tmp_path / "d", tmp_path / "d.gguf", "--to", "gguf-lora")
    assert len(gguf.GGUFReader(tmp_path / "d.gguf").tensors) == 2 * len(dt.deltas(model)[0].entries)
    refused(call("convert", tmp_path / "d", tmp_path / "e", "--to", "gguf-lora"), "one file called `*.gguf`")


def test_errors(call: Call, finished: Path, encoder: str, tmp_path: Path) -> None:
    refused(call("convert", finished, tmp_path / "x", "--to", "megred"), "not converted to `megred`. Did you mean `merged`")
    refused(call("convert", tmp_path / "nowhere", tmp_path / "x", "--to", "native"), "nowhere")
    refused(call("convert", encoder, tmp_path / "x", "--to", "native"), "no `delta.json`")
    refused(call("convert", finished, tmp_path / "x", "--to", "merged", "--rank", 3), "`--rank 3` means nothing for `--to merged`")
    refused(
        call("convert", finished, tmp_path / "x", "--to", "native", "--num-labels", 3), "`--num-labels` is for folders of other libraries"
    )
    refused(call("convert", finished, tmp_path / "x"), "--to")
    refused(call("merge", finished), "OUT")
    assert "Traceback" in call("convert", finished, tmp_path / "x", "--to", "megred", "--debug").err
    assert not (tmp_path / "x").exists()


def test_kinds_that_do_not_convert(call: Call, encoder: str, tmp_path: Path) -> None:
    from deltatune.backbones import load_backbone
    from deltatune.methods import Adapter

    model = load_backbone(encoder, auto_class="AutoModelForSequenceClassification", num_labels=3)
    dt.save(dt.attach(model, Adapter(bottleneck_dim=2), name="d"), tmp_path / "d", backbone_id=encoder)
    for form in ("merged", "lora"):
        refused(call("convert", tmp_path / "d", tmp_path / "x", "--to", form), "cannot be merged")
    refused(call("convert", tmp_path / "d", tmp_path / "x.gguf", "--to", "gguf-lora"), "sits on a `bert`")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_foreign_folder_without_a_backbone(call: Call, tmp_path: Path, encoder: str) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(tmp_path / "p")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused(call("convert", tmp_path / "p", tmp_path / "x", "--to", "native"), "does not name its backbone. Add --backbone NAME")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_run(call: Call, encoder: str, tmp_path: Path, texts: Path, finished: Path) -> None:
    pytest.importorskip("torchao")
    from deltatune.backbones import load_backbone

    model = load_backbone(encoder, auto_class="AutoModelForSequenceClassification", num_labels=3, quantize="int8")
    delta = dt.attach(model, LoRA(rank=2), name="d")
    with torch.no_grad():
        for parameter in delta.trained_parameters().values():
            parameter.add_(0.05)
    dt.save(delta, tmp_path / "d", backbone_id=encoder, training={"quantize": "int8"})
    refused(call("merge", tmp_path / "d", tmp_path / "m"), "is quantised", "`deltatune convert --dequantize`")
    assert call("merge", tmp_path / "d", tmp_path / "m", "--dequantize").code == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged, tokenizer), logits(model, tokenizer), atol=1e-3, rtol=1e-2)
    shutil.rmtree(tmp_path / "m")
