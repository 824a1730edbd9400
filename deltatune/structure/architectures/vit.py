"""ViT (Dosovitskiy et al. 2021, arXiv:2010.11929). It embeds patches, has no stack of tokens, and receives no position ids."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("vit",),
    sites={
        "embedding": "embeddings.patch_embeddings.projection",
        "layer": "layers.{layer}",
        "attention": "layers.{layer}.attention",
        "attention.query": "layers.{layer}.attention.q_proj",
        "attention.key": "layers.{layer}.attention.k_proj",
        "attention.value": "layers.{layer}.attention.v_proj",
        "attention.output": "layers.{layer}.attention.o_proj",
        "feed_forward.up": "layers.{layer}.mlp.fc1",
        "feed_forward.down": "layers.{layer}.mlp.fc2",
        "norm": ("layernorm_before", "layernorm_after", "layernorm"),
        "readout": "classifier",
    },
)
