"""LoRA on tied weights: the same change at every module, both ways; and what PEFT makes of anything else."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import deltatune as dt
from deltatune.errors import Unsupported
from deltatune.methods import DoRA, LoRA, LoRAFA
from tests.checkpoint.peft.cases import Case, lora, meaning, reopened, result, save, theirs
from tests.conformance.cells import fresh, shake
from tests.models import HEADS, HIDDEN, LAYERS, Example, tokens

TABLES = {"gpt2": "wte", "gemma3": "embed_tokens", "t5": "shared", "bart": "shared", "llama": "embed_tokens", "bert": "word_embeddings"}


def tied(name: str) -> Example:
    """A backbone whose head has the weight of its table."""
    size: dict[str, Any] = {"vocab_size": 101, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**size, intermediate_size=64, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval(), tokens()
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=64)).eval(), tokens()
    return fresh(name)


def ensured(name: str, *targets: str) -> Case:
    return Case("tied", name, lambda: lora(target_modules=list(targets), ensure_weight_tying=True))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=5), LoRAFA(rank=2), LoRA(rank=4, rank_stabilized=True)])
@pytest.mark.parametrize("name", TABLES)
def test_peft_opens_ours(name: str, method: Any, tmp_path: Path) -> None:
    backbone, inputs = tied(name)
    plain = result(backbone, inputs)
    table = next(site for site in dt.find_sites(backbone, "embedding").sites if site.tied)
    delta = dt.attach(backbone, method, [table.path, "attention.query"] if name == "bert" else table.path, name="ours", head=False)
    shake(delta)
    expected = result(backbone, inputs)
    assert (expected - plain).abs().max() > 1e-3
    dt.save(delta, tmp_path / "ours", format="peft")
    assert meaning(tmp_path / "ours")["ensure_weight_tying"]
    dt.detach(delta)
    close(result(reopened(backbone, tmp_path / "ours"), inputs), expected)
    again = dt.load(backbone, tmp_path / "ours", name="again")
    close(result(backbone, inputs), expected)
    dt.save(again, tmp_path / "twice", format="peft")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ("lm_head",)), ("llama", ("embed_tokens", "q_proj")), ("gemma3", ("lm_head",)), ("gpt2", ("lm_head",))]
)
def test_we_open_what_peft_ties(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    backbone, inputs = tied(name)
    model = theirs(ensured(name, *targets), backbone)
    expected = result(model, inputs)
    save(model, tmp_path / "theirs")
    delta = dt.load(backbone, tmp_path / "theirs", name="read")
    close(result(backbone, inputs), expected)
    dt.save(delta, tmp_path / "ours", format="peft")
    dt.detach(delta)
    close(result(reopened(backbone, tmp_path / "ours"), inputs), expected)


def test_what_peft_itself_loses(tmp_path: Path) -> None:
    """It ties a head only where a target is called ``embed_tokens`` or ``lm_head``, and its own config for GPT-2 names neither."""
    backbone, inputs = tied("gpt2")
    model = theirs(ensured("gpt2", "lm_head"), backbone)
    save(model, tmp_path / "theirs")
    assert meaning(tmp_path / "theirs")["target_modules"] == ["transformer.wte"]
    assert (result(reopened(backbone, tmp_path / "theirs"), inputs) - result(model, inputs)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("llama", ["embed_tokens"], "not `lm_head`"),
        ("llama", ["lm_head"], "not `model.embed_tokens`"),
        ("bert", ["word_embeddings"], "not `cls.predictions.decoder`"),
        ("gpt2", ["wte"], "not `lm_head`"),
        ("t5", ["lm_head"], "not `encoder.embed_tokens`"),
        ("llama", ["embed_tokens", "lm_head"], "in two ways"),
    ],
)
def test_one_of_two_uses_is_refused(name: str, target: list[str], words: str, tmp_path: Path) -> None:
    """PEFT trains it, and merging shows what is wrong with it: the one weight takes the change, and both uses see it."""
    backbone, inputs = tied(name)
    model = theirs(Case("tied", name, lambda: lora(target_modules=target)), backbone)
    save(model, tmp_path / "theirs")
    plain = result(backbone, inputs)
    with pytest.raises(Unsupported, match=words):
        dt.load(backbone, tmp_path / "theirs", name="read")
    assert not dt.deltas(backbone) and result(backbone, inputs).equal(plain)
    expected = result(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = copy.deepcopy(model).merge_and_unload()
    assert (result(merged, inputs) - expected).abs().max() > 0.01


def test_tables_that_peft_leaves_untied_are_refused(tmp_path: Path) -> None:
    """It ties T5's head alone: each stack's table gets a change of its own, and that of ``shared`` is never read."""
    backbone, inputs = tied("t5")
    model = theirs(ensured("t5", "lm_head"), backbone)
    save(model, tmp_path / "theirs")
    with pytest.raises(Unsupported, match="in two ways"):
        dt.load(backbone, tmp_path / "theirs", name="read")
    alone = theirs(Case("tied", "t5", lambda: lora(target_modules=["shared"])), backbone)
    assert result(alone, inputs).equal(result(backbone, inputs))
    save(alone, tmp_path / "shared")
    with pytest.raises(Unsupported, match=r"and not `encoder.embed_tokens`"):
        dt.load(backbone, tmp_path / "shared", name="read")


def test_norms_of_a_tied_weight_are_refused(tmp_path: Path) -> None:
    delta = dt.attach(tied("llama")[0], DoRA(rank=2), "embed_tokens")
    with pytest.raises(Unsupported, match="tied"):
        dt.save(delta, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()
