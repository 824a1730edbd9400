"""PEFT's format: its config, its names, and one small registered class for each of its types."""

from __future__ import annotations

from deltatune.checkpoint.peft.format import PeftFormat as PeftFormat
from deltatune.checkpoint.peft.lora import Lora as Lora

__all__ = ["Lora", "PeftFormat"]
