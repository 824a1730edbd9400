"""deltatune: any delta method, on any ``nn.Module``, behind one small kernel.

>>> import deltatune as dt
>>> from deltatune.methods import LoRA
>>> from torch import nn
>>> mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> delta = dt.attach(mlp, LoRA(rank=2), where=["0", "2"], name="first")
>>> delta
Delta('first', LoRA(rank=2, alpha=16.0, dropout=0.0, rank_stabilized=False, ranks=(), init='kaiming'), 2 sites, enabled)
>>> dt.detach(delta)

Importing it loads torch and nothing heavier; what needs transformers, rich or datasets loads them at its first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltatune.injection.attach import attach, detach
from deltatune.injection.compose import Composition, compose
from deltatune.injection.delta import Budget, Delta
from deltatune.injection.fresh import reset
from deltatune.injection.merge import merge, unmerge
from deltatune.injection.switching import deltas, disabled, recompute, refresh, switch
from deltatune.structure.where import find_sites

if TYPE_CHECKING:
    from deltatune.checkpoint.combine import combine
    from deltatune.checkpoint.format import load, save
    from deltatune.injection.state import backbone_state
    from deltatune.multi.bank import bank
    from deltatune.multi.routing import route
    from deltatune.multi.together.job import Job
    from deltatune.multi.together.together import train_together
    from deltatune.structure.tree import tree
    from deltatune.training.estimate import estimate
    from deltatune.training.opening import open
    from deltatune.training.train import train

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Composition",
    "Delta",
    "Job",
    "attach",
    "backbone_state",
    "bank",
    "combine",
    "compose",
    "deltas",
    "detach",
    "disabled",
    "estimate",
    "find_sites",
    "load",
    "merge",
    "open",
    "recompute",
    "refresh",
    "reset",
    "route",
    "save",
    "switch",
    "train",
    "train_together",
    "tree",
    "unmerge",
]

_LATER = {
    "Job": "deltatune.multi.together.job",
    "backbone_state": "deltatune.injection.state",
    "bank": "deltatune.multi.bank",
    "combine": "deltatune.checkpoint.combine",
    "estimate": "deltatune.training.estimate",
    "load": "deltatune.checkpoint.format",
    "open": "deltatune.training.opening",
    "route": "deltatune.multi.routing",
    "save": "deltatune.checkpoint.format",
    "train": "deltatune.training.train",
    "train_together": "deltatune.multi.together.together",
    "tree": "deltatune.structure.tree",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
