"""DeBERTa-v2 and v3 (He et al. 2021, arXiv:2006.03654): relative positions share the query and key projections.

The projections and the encoder's norm also receive the table of relative positions, whose rows are no rows of the
batch, so they cannot be routed; the table itself is read by the encoder without being called.
"""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("deberta-v2",),
    sites={
        "embedding": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "layer": "encoder.layer.{layer}",
        "attention": "encoder.layer.{layer}.attention.self",
        "attention.query": "encoder.layer.{layer}.attention.self.query_proj",
        "attention.key": "encoder.layer.{layer}.attention.self.key_proj",
        "attention.value": "encoder.layer.{layer}.attention.self.value_proj",
        "attention.output": "encoder.layer.{layer}.attention.output.dense",
        "feed_forward.up": "encoder.layer.{layer}.intermediate.dense",
        "feed_forward.down": "encoder.layer.{layer}.output.dense",
        "norm": "LayerNorm",
        "lm_head": "cls.predictions.decoder",
        "readout": ("classifier", "qa_outputs", "pooler"),
    },
    parameters=("encoder:rel_embeddings.weight",),
    stacks=(StackPattern(layers="encoder.layer", embedding="embeddings.word_embeddings"),),
    unreached=("encoder.rel_embeddings",),
    unroutable=("attention.self.query_proj", "attention.self.key_proj", "encoder.LayerNorm"),
)
