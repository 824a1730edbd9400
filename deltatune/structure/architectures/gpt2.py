"""GPT-2 (Radford et al. 2019): a fused [q; k; v], with weights stored (in, out) as ``Conv1D``."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, Fused, StackPattern

ARCHITECTURE = Architecture(
    model_types=("gpt2",),
    sites={
        "embedding": "wte",
        "position": "wpe",
        "layer": "h.{layer}",
        "attention": "h.{layer}.attn",
        "attention.output": "h.{layer}.attn.c_proj",
        "cross_attention": "h.{layer}.crossattention",
        "cross_attention.query": "h.{layer}.crossattention.q_attn",
        "cross_attention.output": "h.{layer}.crossattention.c_proj",
        "feed_forward.up": "h.{layer}.mlp.c_fc",
        "feed_forward.down": "h.{layer}.mlp.c_proj",
        "norm": ("h.{layer}.ln_1", "h.{layer}.ln_2", "h.{layer}.ln_cross_attn", "ln_f"),
        "lm_head": "lm_head",
        "readout": ("score", "classifier", "qa_outputs", "multiple_choice_head"),
    },
    fused=(
        Fused("h.{layer}.attn.c_attn", ("attention.query", "attention.key", "attention.value"), "equal"),
        Fused("h.{layer}.crossattention.c_attn", ("cross_attention.key", "cross_attention.value"), "equal"),
    ),
    stacks=(StackPattern(layers="h", embedding="wte"),),
)
