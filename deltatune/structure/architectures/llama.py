"""Llama (Touvron et al. 2023, arXiv:2302.13971) and the models that kept its modules: Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    sites={
        "embedding": "embed_tokens",
        "position": "rotary_emb",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.self_attn",
        "attention.query": "layers.{layer}.self_attn.q_proj",
        "attention.key": "layers.{layer}.self_attn.k_proj",
        "attention.value": "layers.{layer}.self_attn.v_proj",
        "attention.output": "layers.{layer}.self_attn.o_proj",
        "feed_forward.gate": "layers.{layer}.mlp.gate_proj",
        "feed_forward.up": "layers.{layer}.mlp.up_proj",
        "feed_forward.down": "layers.{layer}.mlp.down_proj",
        "norm": ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "norm"),
        "lm_head": "lm_head",
        "readout": ("score", "classifier", "qa_outputs"),
    },
    stacks=(StackPattern(layers="layers", embedding="embed_tokens"),),
)
