"""Inference on models of other shapes: encoder-decoders of PyTorch, mixtures, state spaces, own code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from deltatune.structure.index import Index, index
from tests.models import MODELS


def counted(model: nn.Module) -> dict[str, int]:
    return dict(Counter(site.role for site in index(model) if site.role))


def on_meta(name: str, auto: str = "AutoModelForCausalLM", **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[name](**sizes))


def test_the_encoder_decoder_of_pytorch() -> None:
    model = nn.Transformer(32, 4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=48, batch_first=True)
    found = counted(model)
    assert found["encoder.attention.query"] == found["decoder.attention.query"] == found["decoder.cross_attention.query"] == 2
    assert found["encoder.feed_forward.up"] == found["decoder.feed_forward.down"] == 2
    assert found["encoder.norm"] == 5
    assert found["decoder.norm"] == 7
    unreached = [site.path for site in index(model) if not site.reached and site.path.endswith("out_proj")]
    assert len(unreached) == 6


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ff = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))


class OwnModel(nn.Module):
    """A transformer as people write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(50, 16)
        self.pos_emb = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.token_emb(ids) + self.pos_emb(torch.arange(ids.shape[1])))


def test_a_transformer_of_ones_own() -> None:
    model = OwnModel()
    assert counted(model) == {
        "embedding": 1,
        "position": 1,
        "layer": 3,
        "norm": 3,
        "attention": 3,
        "attention.query": 3,
        "attention.key": 3,
        "attention.value": 3,
        "attention.output": 3,
        "feed_forward.up": 3,
        "feed_forward.down": 3,
        "readout": 1,
    }
    index_ = index(model)
    assert index_["layers.2.attn.to_out.0"].role == "attention.output"
    assert index_["layers.1.ff.0"].role == "feed_forward.up"
    assert index_["layers.1.ff.2"].layer == 1
    assert not index_["layers.1.ff"].reached
    assert index_.stacks == ()  # it takes no input_ids and inputs_embeds


def test_plain_networks_have_no_roles_but_norms_and_heads() -> None:
    assert {site.path: site.role for site in index(MODELS["conv_net"]()[0]) if site.path} == {
        "conv1": None,
        "bn1": "norm",
        "conv2": None,
        "classifier": "readout",
    }
    assert [site.path for site in index(MODELS["mlp"]()[0])] == ["", "0", "1", "2", "2.0", "2.1", "3"]
    assert counted(MODELS["mlp"]()[0]) == {}


TINY: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
DECODER: dict[str, Any] = TINY | {"num_attention_heads": 4, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}


def test_a_mixture_with_a_shared_expert_and_a_router() -> None:
    model = on_meta(
        "qwen2_moe", **DECODER, num_key_value_heads=2, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24
    )
    found = counted(model)
    assert found["experts.gate"] == found["experts.up"] == found["experts.down"] == 2
    assert found["feed_forward.gate"] == found["feed_forward.up"] == found["feed_forward.down"] == 2
    routers = [site for site in Index(model) if site.path.endswith(("mlp.gate", "shared_expert_gate"))]
    assert [site.role for site in routers] == [None] * 4


def test_experts_that_are_modules() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention(16)
            self.gate = nn.Linear(16, 2)
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(16, 32), "w2": nn.Linear(32, 16), "w3": nn.Linear(16, 32)}) for _ in range(2)
            )

    model = nn.Module()
    model.layers = nn.ModuleList([Experts(), Experts()])
    found = {site.path: site.role for site in index(model) if site.path.startswith("layers.0.") and site.role}
    assert found == {
        "layers.0.self_attn": "attention",
        "layers.0.self_attn.to_q": "attention.query",
        "layers.0.self_attn.to_k": "attention.key",
        "layers.0.self_attn.to_v": "attention.value",
        "layers.0.self_attn.to_out.0": "attention.output",
        "layers.0.experts.0.w1": "experts.gate",
        "layers.0.experts.0.w2": "experts.down",
        "layers.0.experts.0.w3": "experts.up",
        "layers.0.experts.1.w1": "experts.gate",
        "layers.0.experts.1.w2": "experts.down",
        "layers.0.experts.1.w3": "experts.up",
    }
    assert index(model)["layers.1.experts.0.w1"].layer == 1


def test_models_without_a_plain_attention_still_have_layers() -> None:
    mamba = on_meta("mamba", **TINY)
    assert counted(mamba) == {"stack": 1, "embedding": 1, "layer": 2, "norm": 3, "lm_head": 1}
    latent = counted(on_meta("deepseek_v3", **DECODER, n_routed_experts=4, moe_intermediate_size=24, first_k_dense_replace=2))
    assert latent["layer"] == 2
    assert latent["feed_forward.gate"] == 2
    assert "attention.query" not in latent


@pytest.mark.parametrize(
    ("name", "auto", "sizes"),
    [
        ("roberta", "AutoModelForMaskedLM", DECODER),
        ("mpnet", "AutoModelForMaskedLM", DECODER),
        ("bert", "AutoModelForMaskedLM", DECODER),
        (
            "gptj",
            "AutoModelForCausalLM",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
        ),
        ("stablelm", "AutoModelForCausalLM", DECODER),
        ("starcoder2", "AutoModelForCausalLM", DECODER | {"num_key_value_heads": 2}),
        ("electra", "AutoModelForMaskedLM", DECODER),
    ],
)
def test_other_models_with_a_language_model_head(name: str, auto: str, sizes: dict[str, Any]) -> None:
    model = on_meta(name, auto, **sizes)
    for use_files in (True, False):
        sites = [site for site in Index(model, use_files) if site.role]
        found = Counter(site.role for site in sites)
        assert {found[f"attention.{leaf}"] for leaf in ("query", "key", "value", "output")} == {2}
        assert found["feed_forward.up"] == found["feed_forward.down"] == 2
        (head,) = [site for site in sites if site.role == "lm_head"]
        assert head.module is model.get_output_embeddings()


def test_speech_models_have_sides_and_one_token_stack() -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = on_meta("whisper", "AutoModelForSpeechSeq2Seq", **sizes, encoder_ffn_dim=48, decoder_ffn_dim=48)
    assert [stack.side for stack in index(model).stacks] == ["decoder"]
    assert counted(model)["decoder.cross_attention.query"] == 2
    assert counted(model)["encoder.attention.query"] == 2


def test_a_vision_and_text_pair_has_roles_without_sides() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = on_meta("clip", "AutoModel", text_config=text | {"vocab_size": 99}, vision_config=text)
    found = counted(model)
    assert found["attention.query"] == 4
    assert index(model).depths == {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}


def test_bert_as_a_decoder_with_cross_attention() -> None:
    model = on_meta("bert", **DECODER, is_decoder=True, add_cross_attention=True)
    for use_files in (True, False):
        found = Counter(site.role for site in Index(model, use_files) if site.role)
        assert (
            found["cross_attention.query"] == found["cross_attention.output"] == found["attention.query"] == found["attention.output"] == 2
        )
        assert found["cross_attention"] == found["attention"] == 2


def test_gpt2_with_cross_attention() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    model = on_meta("gpt2", **sizes, add_cross_attention=True)
    found = counted(model)
    assert {found[f"{kind}.{leaf}"] for kind in ("attention", "cross_attention") for leaf in ("query", "key", "value", "output")} == {2}


def test_an_encoder_and_a_decoder_of_different_families() -> None:
    sizes = DECODER | {"max_position_embeddings": 16}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    )
    with torch.device("meta"):
        model = transformers.EncoderDecoderModel(config)
    found = counted(model)
    assert found["encoder.attention.query"] == found["decoder.attention.query"] == found["decoder.cross_attention.query"] == 2
    assert found["encoder.stack"] == found["decoder.stack"] == 1
