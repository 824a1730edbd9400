"""Silence for the libraries underneath while a backbone loads: progress bars, load reports, import notices."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree", "torch.distributed.elastic.multiprocessing.redirects", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only, and no progress bars, from transformers and what it imports; the settings of before come back."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers.utils.logging

    transformers_logging: Any = transformers.utils.logging
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
