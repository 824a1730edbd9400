"""PEFT's format: its config, its names, and one small registered class for each of its types."""

from __future__ import annotations

from deltatune.checkpoint.peft.adalora import Adalora as Adalora
from deltatune.checkpoint.peft.format import PeftFormat as PeftFormat
from deltatune.checkpoint.peft.hira import Hira as Hira
from deltatune.checkpoint.peft.ia3 import Ia3 as Ia3
from deltatune.checkpoint.peft.lora import Lora as Lora
from deltatune.checkpoint.peft.lycoris import Loha as Loha
from deltatune.checkpoint.peft.lycoris import Lokr as Lokr
from deltatune.checkpoint.peft.miss import Miss as Miss
from deltatune.checkpoint.peft.norms import Norms as Norms
from deltatune.checkpoint.peft.oft import Oft as Oft
from deltatune.checkpoint.peft.prefix import Prefixes as Prefixes
from deltatune.checkpoint.peft.prompts import MadePrompts as MadePrompts
from deltatune.checkpoint.peft.prompts import Prompts as Prompts
from deltatune.checkpoint.peft.shira import Shira as Shira
from deltatune.checkpoint.peft.tokens import Tokens as Tokens
from deltatune.checkpoint.peft.tuner import Tuner as Tuner
from deltatune.checkpoint.peft.tuner import tuners as tuners
from deltatune.checkpoint.peft.vera import Vera as Vera

__all__ = [
    "Adalora",
    "Hira",
    "Ia3",
    "Loha",
    "Lokr",
    "Lora",
    "MadePrompts",
    "Miss",
    "Norms",
    "Oft",
    "PeftFormat",
    "Prefixes",
    "Prompts",
    "Shira",
    "Tokens",
    "Tuner",
    "Vera",
    "tuners",
]
