"""Where deltatune keeps what can be made again: converted backbones, tokens, activations, compiled loops."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$DELTATUNE_CACHE``, else the platform's cache folder."""
    if folder := os.environ.get("DELTATUNE_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "deltatune"
