"""Mixtral (arXiv:2401.04088) and Qwen 3 MoE: Llama's attention, and experts fused into parameters (expert, out, in)."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture, Fused
from deltatune.structure.architectures.llama import ARCHITECTURE as LLAMA

ARCHITECTURE = Architecture(
    model_types=("mixtral", "qwen3_moe"),
    sites={**LLAMA.sites, "experts.down": "layers.{layer}.mlp.experts:down_proj"},
    fused=(Fused("layers.{layer}.mlp.experts:gate_up_proj", ("experts.gate", "experts.up"), "equal"),),
    stacks=LLAMA.stacks,
)
