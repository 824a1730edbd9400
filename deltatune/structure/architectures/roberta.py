"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's modules, another position table and other heads."""

from __future__ import annotations

from deltatune.structure.architecture import Architecture
from deltatune.structure.architectures.bert import ARCHITECTURE as BERT

ARCHITECTURE = Architecture(
    model_types=("roberta", "xlm-roberta", "camembert"),
    sites={
        **BERT.sites,
        "norm": ("LayerNorm", "lm_head.layer_norm"),
        "lm_head": "lm_head.decoder",
        "readout": ("classifier", "qa_outputs"),
    },
    stacks=BERT.stacks,
)
