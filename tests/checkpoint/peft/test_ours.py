"""From our side: every method goes out so that PEFT computes the same, or is refused and leaves nothing behind."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import deltatune as dt
from deltatune.checkpoint.peft import tuners
from deltatune.errors import CheckpointError, OutputError, UnknownName, Unsupported
from deltatune.injection.delta import Delta
from deltatune.methods import IA3, BitFit, DoRA, FullFineTuning, LoRA, PrefixTuning, PromptTuning, PTuning, TrainableTokens, methods
from tests.checkpoint.peft.cases import meaning, reopened, result
from tests.conformance.cells import fresh, shake, small
from tests.models import tokens

HELD = sorted({methods.name_of(method) for kind in tuners for method in tuners[kind].methods})
PROMPTS = {"prompt-tuning", "embedding-prefix-tuning", "p-tuning"}
REFUSED = {
    ("trainable-tokens", "bert"): "has no head",
    ("prefix-tuning", "t5"): "every self-attention of one stack",
    ("p-tuning-v2", "t5"): "every self-attention of one stack",
}


def saved(delta: Delta | dt.Composition, folder: Path) -> Path:
    return dt.save(delta, folder, format="peft")


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", HELD)
def test_every_method_that_peft_holds(name: str, model: str, tmp_path: Path) -> None:
    backbone, inputs = fresh(model)
    backbone = getattr(backbone, "bert", backbone) if name in PROMPTS else backbone
    plain = result(backbone, inputs)
    method: Any = small(name)
    delta = dt.attach(backbone, replace(method, seen_by_decoder=True) if (name in PROMPTS and model == "t5") else method, name="ours")
    shake(delta)
    expected = result(backbone, inputs)
    assert (expected - plain).abs().max() > 1e-5, "it does something"
    if (name, model) in REFUSED:
        with pytest.raises(Unsupported, match=REFUSED[name, model]):
            saved(delta, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    saved(delta, tmp_path / "out")
    bytes_once = (tmp_path / "out" / "adapter_config.json").read_bytes()
    dt.save(delta, tmp_path / "out", format="peft", overwrite=True)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == bytes_once
    dt.detach(delta)
    virtual = 3 if name in PROMPTS and model != "t5" else 0
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "out"), inputs, virtual), expected, atol=1e-5, rtol=1e-4)
    again = dt.load(backbone, tmp_path / "out")
    assert again.name == "out"
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(methods) - set(HELD) - {"frozen"}))
def test_every_other_method_is_refused(name: str, tmp_path: Path) -> None:
    backbone, _ = fresh("bert")
    delta = dt.attach(backbone, small(name))
    with pytest.raises(Unsupported, match="PEFT cannot hold"):
        saved(delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_roles_of_a_fused_projection_are_refused(tmp_path: Path) -> None:
    backbone, _ = fresh("gpt2")
    delta = dt.attach(backbone, LoRA(rank=2), "attention.query")
    with pytest.raises(Unsupported, match="one role of a fused projection"):
        saved(delta, tmp_path / "out")


def test_ranks_and_alphas_become_patterns(tmp_path: Path) -> None:
    """Deltas of one type at different modules are one folder: PEFT's patterns."""
    backbone, inputs = fresh("bert")
    dt.attach(backbone, LoRA(rank=2, alpha=4, ranks=(("layer.1.*", 3),)), "attention.query", name="a", head=False)
    dt.attach(backbone, LoRA(rank=2, alpha=6), "attention.value", name="b", head=False)
    for delta in dt.deltas(backbone):
        shake(delta)
    both = dt.compose(backbone, ["a", "b"])
    expected = result(backbone, inputs)
    saved(both, tmp_path / "out")
    config = meaning(tmp_path / "out")
    assert config["rank_pattern"] == {"bert.encoder.layer.1.attention.self.query": 3}
    assert config["alpha_pattern"] == {f"bert.encoder.layer.{k}.attention.self.value": 6 for k in range(2)}
    dt.detach(both)
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "out"), inputs), expected, atol=1e-5, rtol=1e-5)
    dt.load(backbone, tmp_path / "out", name="again")
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_composition_with_what_trains_beside(tmp_path: Path) -> None:
    backbone, inputs = fresh("bert")
    ids = tuple(tokens()["input_ids"][0, :2].tolist())
    recipes: list[tuple[Any, Any]] = [
        (DoRA(rank=2), "attention.query"),
        (BitFit(add_missing=False), "attention.query"),
        (TrainableTokens(ids), "embedding"),
        (FullFineTuning(), "bert.pooler.dense"),
    ]
    for k, (method, where) in enumerate(recipes):
        shake(dt.attach(backbone, method, where, name=f"part{k}", head=k == 0))
    whole = dt.compose(backbone, [delta.name for delta in dt.deltas(backbone)])
    expected = result(backbone, inputs)
    saved(whole, tmp_path / "out")
    config = meaning(tmp_path / "out")
    assert config["bias"] == "lora_only" and config["use_dora"] and "bert.pooler.dense" in config["modules_to_save"]
    dt.detach(whole)
    torch.testing.assert_close(result(reopened(backbone, tmp_path / "out"), inputs), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    def refused(words: str, methods: list[Any], where: list[Any], how: Any = "sequential") -> None:
        backbone, _ = fresh("bert")
        names = [dt.attach(backbone, method, place, head=False).name for method, place in zip(methods, where, strict=True)]
        weights = [0.5] * len(names) if how == "weighted" else None
        with pytest.raises(Unsupported, match=words):
            saved(dt.compose(backbone, names, how, weights=weights), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    query, value = "attention.query", "attention.value"
    refused("one type in a folder", [LoRA(rank=2), IA3()], [query, value])
    refused("two deltas of one type", [LoRA(rank=2), LoRA(rank=2)], [query, query])
    refused("weighted composition", [LoRA(rank=2), LoRA(rank=2)], [query, value], "weighted")
    refused("one dropout, scale and kind", [LoRA(rank=2), DoRA(rank=2)], [query, value])
    refused("neither the biases of exactly", [LoRA(rank=2), BitFit()], [query, value])
    refused("one prefix in a folder", [PrefixTuning(num_virtual_tokens=2)] * 2, ["attention", "attention"])


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_prompt_that_the_decoder_does_not_see_is_none_of_pefts(name: str, tmp_path: Path) -> None:
    delta = dt.attach(fresh("t5")[0], small(name))
    with pytest.raises(Unsupported, match="seen_by_decoder=True"):
        saved(delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["T5ForSequenceClassification", "BartForSequenceClassification", "BartForQuestionAnswering"])
def test_prompts_of_encoder_decoders_that_peft_cannot_run(kind: str, tmp_path: Path) -> None:
    """They make the decoder's ids from the text's, and PEFT gives them embeddings: its error, and ours ahead of it."""
    size: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "eos_token_id": 1}
    bart = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = transformers.T5Config(**size) if kind.startswith("T5") else transformers.BartConfig(d_model=32, vocab_size=50, **bart)
    backbone = getattr(transformers, kind)(config).eval()
    task = "QUESTION_ANS" if kind.endswith("Answering") else "SEQ_CLS"
    ids = torch.tensor([[5, 6, 7, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(backbone), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
        with pytest.raises((NotImplementedError, ValueError), match=r"Passing input embeddings is|no `decoder_input_ids`"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    delta = dt.attach(backbone, PromptTuning(3, seen_by_decoder=True), head=False)
    with pytest.raises(Unsupported, match="PEFT cannot run it"):
        saved(delta, tmp_path / "out")


def test_some_layers_only_are_no_prefix_of_pefts(tmp_path: Path) -> None:
    backbone, _ = fresh("llama")
    delta = dt.attach(backbone, PrefixTuning(num_virtual_tokens=2), layers=[1])
    with pytest.raises(Unsupported, match="every self-attention"):
        saved(delta, tmp_path / "out")


def test_what_makes_a_prompt_is_left_out(tmp_path: Path) -> None:
    """PEFT stores no encoder either: what comes back is the final form, with the same outputs."""
    backbone, inputs = fresh("llama")
    delta = dt.attach(backbone, PTuning(num_virtual_tokens=3, hidden_dim=4), name="ours")
    expected = result(backbone, inputs)
    saved(delta, tmp_path / "out")
    dt.detach(delta)
    again = dt.load(backbone, tmp_path / "out")
    assert isinstance(again, Delta) and isinstance(again.method, PTuning) and again.method.is_exported(again.patches)
    assert again.method.hidden_dim == 4
    torch.testing.assert_close(result(backbone, inputs), expected, atol=1e-5, rtol=1e-5)


def test_targets_that_are_the_end_of_another_path(tmp_path: Path) -> None:
    """`0` would also hit `inner.0` in PEFT, so the config says an expression."""
    from torch import nn

    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    delta = dt.attach(mlp, LoRA(rank=1), where=lambda site: site.path == "0", name="ours")
    shake(delta)
    expected = mlp(x)
    saved(delta, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == "0"
    dt.detach(delta)
    torch.testing.assert_close(reopened(mlp, tmp_path / "out")(x), expected)
    dt.load(mlp, tmp_path / "out")
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("model", ["bert", "llama", "t5", "gpt2"])
def test_transformers_own_load_adapter(model: str, tmp_path: Path) -> None:
    backbone, inputs = fresh(model)
    dt.attach(backbone, LoRA(rank=2), ["c_attn"] if model == "gpt2" else None, name="ours", head=False)
    [delta] = dt.deltas(backbone)
    shake(delta)
    expected = result(backbone, inputs)
    saved(delta, tmp_path / "out")
    dt.detach(delta)
    other: Any = copy.deepcopy(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(result(other.eval(), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("formats", [("native", "peft"), ("peft", "native")])
def test_a_folder_holds_one_delta_in_whatever_format(formats: tuple[str, str], tmp_path: Path) -> None:
    """The one it held before does not stay beside it, to be read in its place."""
    backbone, _ = fresh("bert")
    for rank, format in enumerate(formats, 1):
        delta = dt.attach(backbone, LoRA(rank=rank), name="ours", head=False)
        dt.save(delta, tmp_path / "out", format=format, overwrite=True)
        dt.detach(delta)
        (tmp_path / "out" / "README.md").write_text("mine")
    again = dt.load(backbone, tmp_path / "out")
    assert isinstance(again, Delta) and again.method == LoRA(rank=2)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_other_refusals(tmp_path: Path) -> None:
    backbone, _ = fresh("llama")
    delta = dt.attach(backbone, LoRA(rank=2), name="ours")
    with pytest.raises(UnknownName, match="peft"):
        dt.save(delta, tmp_path / "out", format="pfet")
    saved(delta, tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        saved(delta, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("kept")
    dt.save(delta, tmp_path / "out", format="peft", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    with torch.no_grad():
        next(delta.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        saved(delta, tmp_path / "nan")
