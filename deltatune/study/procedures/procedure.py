"""The table of procedures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deltatune.registry import Registry
from deltatune.study.trial import Outcome, Trial

Procedure = Callable[[Trial, Path], Outcome]
"""Carries a trial out. Its folder is its own, survives a kill, and holds what is needed to go on; it may be there already."""

procedures: Registry[Procedure] = Registry("procedure", "procedures", builtin="deltatune.study.procedures.builtin")
"""Every procedure, by the name that designs use."""
