"""OPT (Zhang et al. 2022, arXiv:2205.01068). Its stack is ``OPTDecoder``; ``OPTForCausalLM`` never calls ``OPTModel``."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("opt",),
    sites={
        "embedding": "embed_tokens",
        "position": "embed_positions",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.self_attn",
        "attention.query": "layers.{layer}.self_attn.q_proj",
        "attention.key": "layers.{layer}.self_attn.k_proj",
        "attention.value": "layers.{layer}.self_attn.v_proj",
        "attention.output": "layers.{layer}.self_attn.out_proj",
        "feed_forward.up": "layers.{layer}.fc1",
        "feed_forward.down": "layers.{layer}.fc2",
        "norm": ("self_attn_layer_norm", "final_layer_norm"),
        "lm_head": "lm_head",
        "readout": ("score", "qa_outputs"),
    },
    stacks=(StackPattern(layers="layers", embedding="embed_tokens"),),
)
