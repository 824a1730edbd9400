"""BERT (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, StackPattern

ARCHITECTURE = Architecture(
    model_types=("bert",),
    sites={
        "embedding": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "layer": "encoder.layer.{layer}",
        "attention": "encoder.layer.{layer}.attention.self",
        "attention.query": "encoder.layer.{layer}.attention.self.query",
        "attention.key": "encoder.layer.{layer}.attention.self.key",
        "attention.value": "encoder.layer.{layer}.attention.self.value",
        "attention.output": "encoder.layer.{layer}.attention.output.dense",
        "cross_attention": "encoder.layer.{layer}.crossattention.self",
        "cross_attention.query": "encoder.layer.{layer}.crossattention.self.query",
        "cross_attention.key": "encoder.layer.{layer}.crossattention.self.key",
        "cross_attention.value": "encoder.layer.{layer}.crossattention.self.value",
        "cross_attention.output": "encoder.layer.{layer}.crossattention.output.dense",
        "feed_forward.up": "encoder.layer.{layer}.intermediate.dense",
        "feed_forward.down": "encoder.layer.{layer}.output.dense",
        "norm": "LayerNorm",
        "lm_head": "cls.predictions.decoder",
        "readout": ("classifier", "qa_outputs"),
    },
    stacks=(StackPattern(layers="encoder.layer", embedding="embeddings.word_embeddings", inner="encoder"),),
)
