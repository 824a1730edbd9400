"""T5 (Raffel et al. 2020, arXiv:1910.10683) and mT5. ``shared`` only holds the weight of the stacks' embeddings."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("t5", "mt5"),
    sites={
        "embedding": "embed_tokens",
        "layer": "block.{layer}",
        "attention": "block.{layer}.layer.{i}.SelfAttention",
        "attention.query": "SelfAttention.q",
        "attention.key": "SelfAttention.k",
        "attention.value": "SelfAttention.v",
        "attention.output": "SelfAttention.o",
        "cross_attention": "block.{layer}.layer.{i}.EncDecAttention",
        "cross_attention.query": "EncDecAttention.q",
        "cross_attention.key": "EncDecAttention.k",
        "cross_attention.value": "EncDecAttention.v",
        "cross_attention.output": "EncDecAttention.o",
        "feed_forward.gate": "DenseReluDense.wi_0",
        "feed_forward.up": ("DenseReluDense.wi", "DenseReluDense.wi_1"),
        "feed_forward.down": "DenseReluDense.wo",
        "norm": ("layer_norm", "final_layer_norm"),
        "lm_head": "lm_head",
        "readout": ("classification_head", "qa_outputs", "classifier"),
    },
    stacks=(StackPattern(layers="block", embedding="embed_tokens"),),
    unreached=("shared",),
)
