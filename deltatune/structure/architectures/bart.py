"""BART (Lewis et al. 2020, arXiv:1910.13461) and mBART. ``shared`` only holds the weight of the stacks' embeddings."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("bart", "mbart"),
    sites={
        "embedding": "embed_tokens",
        "position": "embed_positions",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.self_attn",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.out_proj",
        "cross_attention": "layers.{layer}.encoder_attn",
        "cross_attention.query": "encoder_attn.q_proj",
        "cross_attention.key": "encoder_attn.k_proj",
        "cross_attention.value": "encoder_attn.v_proj",
        "cross_attention.output": "encoder_attn.out_proj",
        "feed_forward.up": "layers.{layer}.fc1",
        "feed_forward.down": "layers.{layer}.fc2",
        "norm": ("layernorm_embedding", "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layer_norm"),
        "lm_head": "lm_head",
        "readout": ("classification_head", "qa_outputs"),
    },
    stacks=(StackPattern(layers="layers", embedding="embed_tokens"),),
    unreached=("shared",),
)
