"""Tiny random backbones, one per architecture: ``MODELS[name]()`` gives ``(model in eval mode, example inputs)``.

The same name gives the same weights and inputs every time. Hidden size 32, 2 layers, 4 heads (2 for keys and values
where they are grouped), 64 positions, windows of 8 tokens. GPT-2, T5, BART, OPT, BLOOM and Gemma tie their embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Example = tuple[nn.Module, dict[str, Tensor]]

VOCABULARY = 101
HIDDEN = 32
FEED_FORWARD = 48
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
POSITIONS = 64
WINDOW = 8
BATCH, LENGTH = 2, 12
LABELS = 3

_DECODER: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=FEED_FORWARD,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=POSITIONS,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GROUPED: dict[str, Any] = _DECODER | dict(num_key_value_heads=KEY_VALUE_HEADS)
_ENCODER: dict[str, Any] = _DECODER | dict(num_labels=LABELS)


def tokens(padding: int = 0, pad_token_id: int = 0, seed: int = 7) -> dict[str, Tensor]:
    """Token ids (batch, length) and their mask; the last ``padding`` tokens of the last row are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        ids[-1, -padding:] = pad_token_id
        mask[-1, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The main output: the logits, the last hidden state, or what a plain module returns."""
    result = model(**inputs)
    if isinstance(result, Tensor):
        return result
    return result.logits if getattr(result, "logits", None) is not None else result[0]


def _eval(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
                elif parameter.std() < 0.1:  # an initial 0.02 makes attention uniform, which would hide mistakes too
                    parameter.mul_(0.15 / parameter.std())
    return model.eval()


def _encoder(config: Any, padding: int = 2) -> Example:
    model = _eval(lambda: transformers.AutoModelForSequenceClassification.from_config(config))
    return model, tokens(padding, config.pad_token_id)


def _decoder(config: Any) -> Example:
    return _eval(lambda: transformers.AutoModelForCausalLM.from_config(config)), tokens()


def _seq2seq(config: Any) -> Example:
    model = _eval(lambda: transformers.AutoModelForSeq2SeqLM.from_config(config))
    target = tokens(seed=8)["input_ids"][:, :5]
    return model, tokens(2, config.pad_token_id) | {"decoder_input_ids": target}


def bert() -> Example:
    return _encoder(transformers.BertConfig(**_ENCODER))


def roberta() -> Example:
    return _encoder(transformers.RobertaConfig(**_ENCODER | dict(pad_token_id=1, bos_token_id=0, max_position_embeddings=POSITIONS + 2)))


def deberta_v2() -> Example:
    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, norm_rel_ebd="layer_norm")
    shared = dict(share_att_key=True, position_buckets=8, type_vocab_size=0)
    return _encoder(transformers.DebertaV2Config(**_ENCODER | relative | shared))


def modernbert() -> Example:
    special = dict(cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=WINDOW)
    return _encoder(transformers.ModernBertConfig(**_ENCODER | special))


def distilbert() -> Example:
    size = dict(dim=HIDDEN, hidden_dim=FEED_FORWARD, n_layers=LAYERS, n_heads=HEADS)
    return _encoder(
        transformers.DistilBertConfig(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, pad_token_id=0, num_labels=LABELS, **size)
    )


def mpnet() -> Example:
    return _encoder(transformers.MPNetConfig(**_ENCODER | dict(pad_token_id=1, bos_token_id=0, max_position_embeddings=POSITIONS + 2)))


def gpt2() -> Example:
    size = dict(n_embd=HIDDEN, n_inner=FEED_FORWARD, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS)
    return _decoder(transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **size))


def opt() -> Example:
    return _decoder(transformers.OPTConfig(**_DECODER | dict(ffn_dim=FEED_FORWARD, word_embed_proj_dim=HIDDEN)))


def llama() -> Example:
    return _decoder(transformers.LlamaConfig(**_GROUPED))


def mistral() -> Example:
    return _decoder(transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW))


def qwen3() -> Example:
    return _decoder(transformers.Qwen3Config(**_GROUPED, head_dim=HIDDEN // HEADS))


def gemma3() -> Example:
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, head_dim=HIDDEN // HEADS)
    return _decoder(transformers.Gemma3TextConfig(**_GROUPED, **layers, query_pre_attn_scalar=HIDDEN // HEADS))


def phi() -> Example:
    return _decoder(transformers.PhiConfig(**_DECODER))


def phi3() -> Example:
    return _decoder(transformers.Phi3Config(**_GROUPED))


def gpt_neox() -> Example:
    return _decoder(transformers.GPTNeoXConfig(**_DECODER))


def bloom() -> Example:
    size = dict(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    return _decoder(transformers.BloomConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **size))


def mixtral() -> Example:
    return _decoder(transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> Example:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[1])
    return _decoder(transformers.Qwen3MoeConfig(**_GROUPED, head_dim=HIDDEN // HEADS, **experts))


def t5() -> Example:
    size = dict(d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=FEED_FORWARD, num_layers=LAYERS, num_heads=HEADS)
    return _seq2seq(transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **size))


def bart() -> Example:
    size = dict(d_model=HIDDEN, encoder_ffn_dim=FEED_FORWARD, decoder_ffn_dim=FEED_FORWARD, max_position_embeddings=POSITIONS)
    depth = dict(encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS)
    special = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
    return _seq2seq(transformers.BartConfig(vocab_size=VOCABULARY, **size, **depth, **special))


def vit() -> Example:
    size = dict(hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_channels=3, num_labels=LABELS, **size)
    model = _eval(lambda: transformers.AutoModelForImageClassification.from_config(config))
    return model, {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(7))}


def torch_encoder() -> Example:
    """``nn.TransformerEncoder``: its ``nn.MultiheadAttention`` reads ``in_proj_weight`` and ``out_proj.weight`` itself."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FEED_FORWARD, batch_first=True)
        return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    return _eval(build), {"src": _dense(BATCH, LENGTH, HIDDEN)}


class ConvNet(nn.Module):
    """Two convolutions, a batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.classifier = nn.Linear(16, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = torch.relu(self.conv2(hidden))
        return self.classifier(hidden.mean((-2, -1)))


def conv_net() -> Example:
    return _eval(ConvNet), {"images": _dense(BATCH, 3, 8, 8)}


def mlp() -> Example:
    """A plain ``nn.Sequential`` with a nested one."""

    def build() -> nn.Module:
        inner = nn.Sequential(nn.Linear(FEED_FORWARD, FEED_FORWARD), nn.ReLU())
        return nn.Sequential(nn.Linear(HIDDEN, FEED_FORWARD), nn.ReLU(), inner, nn.Linear(FEED_FORWARD, LABELS))

    return _eval(build), {"input": _dense(BATCH, HIDDEN)}


class TiedMLP(nn.Module):
    """An auto-encoder of two layers whose ``first`` and ``second`` hold one weight Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, LABELS)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def tied_mlp() -> Example:
    return _eval(TiedMLP), {"x": _dense(BATCH, HIDDEN)}


def _dense(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


SORTS: dict[str, tuple[Callable[[], Example], ...]] = {
    "encoder": (bert, roberta, deberta_v2, modernbert, distilbert, mpnet),
    "decoder": (opt, llama, mistral, qwen3, gemma3, phi),
    "fused": (gpt2, phi3, gpt_neox, bloom),
    "mixture": (mixtral, qwen3_moe),
    "seq2seq": (t5, bart),
    "vision": (vit,),
    "torch": (torch_encoder,),
    "plain": (conv_net, mlp, tied_mlp),
}
"""Every architecture under what is special about it: ``fused`` and ``mixture`` are decoders with fused projections and experts."""

ENCODERS, SEQ2SEQ = SORTS["encoder"], SORTS["seq2seq"]
DECODERS = (*SORTS["decoder"], *SORTS["fused"], *SORTS["mixture"])
MODELS: dict[str, Callable[[], Example]] = {build.__name__: build for builds in SORTS.values() for build in builds}
