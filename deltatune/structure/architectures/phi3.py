"""Phi-3 (2024, arXiv:2404.14219): Llama's blocks with a fused [q; k; v] of grouped queries and a fused [gate; up]."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, Fused, StackPattern

ARCHITECTURE = Architecture(
    model_types=("phi3",),
    sites={
        "embedding": "embed_tokens",
        "position": "rotary_emb",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.self_attn",
        "attention.output": "layers.{layer}.self_attn.o_proj",
        "feed_forward.down": "layers.{layer}.mlp.down_proj",
        "norm": ("input_layernorm", "post_attention_layernorm", "norm"),
        "lm_head": "lm_head",
        "readout": ("score", "classifier"),
    },
    fused=(
        Fused("layers.{layer}.self_attn.qkv_proj", ("attention.query", "attention.key", "attention.value"), "grouped"),
        Fused("layers.{layer}.mlp.gate_up_proj", ("feed_forward.gate", "feed_forward.up"), "equal"),
    ),
    stacks=(StackPattern(layers="layers", embedding="embed_tokens"),),
)
