"""Backbones by name: one catalogue for aliases, installed packages, local folders and hub ids."""

from __future__ import annotations

from deltatune.backbones.catalogue import Backbone as Backbone
from deltatune.backbones.catalogue import Package as Package
from deltatune.backbones.catalogue import backbones as backbones
from deltatune.backbones.load import load_backbone as load_backbone
from deltatune.backbones.load import load_config as load_config
from deltatune.backbones.load import load_tokenizer as load_tokenizer
from deltatune.backbones.resolve import Resolved as Resolved
from deltatune.backbones.resolve import backbone_id as backbone_id
from deltatune.backbones.resolve import resolve as resolve

__all__ = ["Backbone", "Package", "Resolved", "backbone_id", "backbones", "load_backbone", "load_config", "load_tokenizer", "resolve"]
