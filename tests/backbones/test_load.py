from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltatune.backbones import load_backbone, load_config, load_tokenizer, resolve
from deltatune.backbones.quiet import quiet
from deltatune.errors import CheckpointError, InvalidValue, UnknownName


def test_minilm_means_the_same_as_its_package_says() -> None:
    backbone, tokenizer = load_backbone("minilm"), load_tokenizer("minilm")
    assert not backbone.training and next(backbone.parameters()).dtype == torch.float32
    texts = ["The match ended in a draw.", "The game finished level.", "Interest rates rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.3 > 0.1 > vectors[0] @ vectors[2]


def test_a_new_head_has_the_labels() -> None:
    backbone = load_backbone("minilm", auto_class="AutoModelForSequenceClassification", label_names=["a", "b", "c"])
    assert backbone.classifier.out_features == 3
    assert backbone.config.id2label == {0: "a", 1: "b", 2: "c"} and backbone.config.label2id["c"] == 2
    assert load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=5).classifier.out_features == 5
    with pytest.raises(InvalidValue, match="`num_labels` is 2, but 3 label names were given"):
        load_backbone("minilm", num_labels=2, label_names=["a", "b", "c"])


def test_dtype_and_options() -> None:
    backbone = load_backbone("minilm", dtype=torch.bfloat16, attn_implementation="eager")
    assert next(backbone.parameters()).dtype == torch.bfloat16
    assert backbone.config._attn_implementation == "eager"


def test_nothing_is_printed_and_the_settings_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    level = logging.getLogger("torchao").level
    load_backbone("minilm", auto_class="AutoModelForSequenceClassification", num_labels=2)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == verbosity and logging.getLogger("torchao").level == level
    assert transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet():
            assert transformers.utils.logging.get_verbosity() == transformers.logging.ERROR
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.enable_progress_bar()


def test_unknown_auto_class_and_quantisation() -> None:
    with pytest.raises(
        UnknownName, match=r"no auto class `AutoModelForSequenceClasification`. Did you mean `AutoModelForSequenceClassification`"
    ):
        load_backbone("minilm", auto_class="AutoModelForSequenceClasification")
    with pytest.raises(InvalidValue, match="`quantize` is `int3`"):
        load_backbone("minilm", quantize="int3")  # type: ignore[arg-type]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with MiniLM that a test may spoil."""
    return Path(shutil.copytree(resolve("minilm").source or "", tmp_path / "copy"))


def test_weights_that_are_missing_are_an_error(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layer.3.attention.self.query" not in name}, copied / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"2 weights of the backbone are missing or have another shape.*layer\.3\.attention\.self\.query"
    ):
        load_backbone(copied, auto_class="AutoModelForSequenceClassification", num_labels=2)


def test_weights_of_another_shape_are_an_error(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="18 weights of the backbone are missing or have another shape"):
        load_backbone(copied)


def test_a_head_of_another_size_is_dropped_only_if_asked(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    trained = transformers.BertForSequenceClassification(config)
    trained.save_pretrained(tmp_path)
    same = load_backbone(tmp_path, auto_class="AutoModelForSequenceClassification")
    assert torch.equal(same.classifier.weight, trained.classifier.weight)
    with pytest.raises(InvalidValue, match=r"holds a trained head of 2 outputs .*, but 5 are wanted.*`new_head=True`"):
        load_backbone(tmp_path, auto_class="AutoModelForSequenceClassification", num_labels=5)
    other = load_backbone(tmp_path, auto_class="AutoModelForSequenceClassification", num_labels=5, new_head=True)
    assert other.classifier.out_features == 5
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, trained.bert.embeddings.word_embeddings.weight)


def test_decoders_get_a_pad_token(tmp_path: Path, tiny_gpt2: Path) -> None:
    assert load_tokenizer(tiny_gpt2).pad_token == "<end>"
    assert load_config(tiny_gpt2).pad_token_id == 1
    backbone = load_backbone(tiny_gpt2, auto_class="AutoModelForSequenceClassification", num_labels=2)
    logits = backbone(
        input_ids=torch.tensor([[2, 3, 1, 1], [2, 3, 4, 5]]), attention_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ).logits
    alone = backbone(input_ids=torch.tensor([[2, 3]])).logits
    assert torch.allclose(logits[0], alone[0], atol=1e-5)


@pytest.fixture
def tiny_gpt2(tmp_path: Path) -> Path:
    """A GPT-2 folder with no pad token and no ``model_max_length``."""
    import tokenizers

    config = transformers.GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 1, "a": 2, "b": 3, "?": 0}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_the_length_limit_is_a_true_one(tiny_gpt2: Path) -> None:
    assert load_tokenizer(tiny_gpt2).model_max_length == 16
    assert load_tokenizer("minilm").model_max_length == 512


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda folder: _shorten(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a pickle of nothing": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(b"x" * 99),
    "truncated config": lambda folder: _shorten(folder / "config.json"),
    "a list for a config": lambda folder: (folder / "config.json").write_text("[1]"),
    "nothing for a config": lambda folder: (folder / "config.json").write_text("null"),
    "an unknown model": lambda folder: (folder / "config.json").write_text('{"model_type": "zzz"}'),
    "truncated tokenizer": lambda folder: _shorten(folder / "tokenizer.json"),
    "a list for a tokenizer": lambda folder: (folder / "tokenizer.json").write_text("[1]"),
    "a list for the tokenizer's config": lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_that_names_the_folder(case: str, tiny_gpt2: Path) -> None:
    BROKEN[case](tiny_gpt2)
    with pytest.raises(CheckpointError, match=r"gpt2` cannot be read: .* Copy or install it again"):
        load_tokenizer(tiny_gpt2)
        load_backbone(tiny_gpt2)
