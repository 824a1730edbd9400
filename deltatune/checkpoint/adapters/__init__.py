"""The adapters library's format: an architecture of its configs is one function, registered under its name.

Its tensors carry the adapter's name within their own: ``<path>.loras.<name>.lora_A``. A union of configs becomes several parts.
"""

from __future__ import annotations

from deltatune.checkpoint.adapters.bottleneck import read_bottleneck as read_bottleneck
from deltatune.checkpoint.adapters.format import AdaptersFormat as AdaptersFormat
from deltatune.checkpoint.adapters.lora import read_lora as read_lora
from deltatune.checkpoint.adapters.prefix import read_prefix as read_prefix

__all__ = ["AdaptersFormat", "read_bottleneck", "read_lora", "read_prefix"]
