"""Gemma 3 (2025, arXiv:2503.19786): Llama's modules and a norm on either side of each block.

Its embedding module scales what it looks up, so inputs that skip it must be scaled already.
"""

from __future__ import annotations

from deltatune.structure.architecture import Architecture
from deltatune.structure.architectures.llama import ARCHITECTURE as LLAMA

ARCHITECTURE = Architecture(
    model_types=("gemma3_text",),
    sites={
        **LLAMA.sites,
        "norm": (*LLAMA.sites["norm"], "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
    stacks=LLAMA.stacks,
)
