"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, a fused [q; k; v] and a fused gated feed-forward.

``Wi`` computes [input; gate] in ModernBERT's words; the first half goes through the activation, which makes it the gate here.
"""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, Fused, StackPattern

ARCHITECTURE = Architecture(
    model_types=("modernbert",),
    sites={
        "embedding": "embeddings.tok_embeddings",
        "position": "rotary_emb",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.attn",
        "attention.output": "layers.{layer}.attn.Wo",
        "feed_forward.down": "layers.{layer}.mlp.Wo",
        "norm": ("embeddings.norm", "layers.{layer}.attn_norm", "layers.{layer}.mlp_norm", "final_norm", "head.norm"),
        "lm_head": "decoder",
        "readout": "classifier",
    },
    fused=(
        Fused("layers.{layer}.attn.Wqkv", ("attention.query", "attention.key", "attention.value"), "equal"),
        Fused("layers.{layer}.mlp.Wi", ("feed_forward.gate", "feed_forward.up"), "equal"),
    ),
    stacks=(StackPattern(layers="layers", embedding="embeddings.tok_embeddings"),),
)
