"""``adapter_config.json``: the fields of every type, those that change nothing, and what is inferred for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PEFT_VERSION = "0.21.2"
"""The version whose format is written."""

HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # the module itself says how it stores its weight
        "inference_mode",
        "megatron_core",  # a name that only counts with megatron_config
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields that change neither what is computed nor what trains."""

BASE: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
"""Fields of every config."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}
"""End of a transformers class -> PEFT's task type."""

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type -> the heads that PEFT takes as trained whether or not they are asked for."""


def task_of(backbone: nn.Module, heads: set[str]) -> str | None:
    """PEFT's task type for a backbone; None where it has none, or where PEFT would expect a head that the delta has not."""
    found = next((task for end, task in TASKS.items() if type(backbone).__name__.endswith(end)), None)
    own = {name for name in HEADS.get(found or "", ()) for path, _ in backbone.named_modules() if path.endswith(name)}
    return found if own <= {path.rpartition(".")[2] for path in heads} | heads else None


def base_fields(backbone: nn.Module, task: str | None, backbone_id: str | None) -> dict[str, Any]:
    """The fields of every config, for one backbone."""
    name = backbone_id or getattr(backbone, "name_or_path", None) or None
    mapping = None if task else {"base_model_class": type(backbone).__name__, "parent_library": type(backbone).__module__}
    return {**BASE, "auto_mapping": mapping, "base_model_name_or_path": name, "task_type": task}


def write_config(file: Path, fields: Mapping[str, Any]) -> None:
    """As PEFT writes it, with lists in order, so that the same delta gives the same bytes."""
    file.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
