"""A backbone is borrowed for training: what the Trainer and its libraries set on it, and around it, is set back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from deltatune.backbones.quiet import quiet
from deltatune.errors import InvalidValue, require_extra
from deltatune.injection.attach import deltas as attached
from deltatune.injection.delta import Delta

if TYPE_CHECKING:
    from deltatune.training.trainer import DeltaTrainer


@contextmanager
def trainer_modules() -> Iterator[None]:
    """Import what training needs without its notices, and keep transformers to errors meanwhile.

    Raises:
        MissingExtra: transformers or accelerate is not installed.
    """
    try:
        with quiet():
            import_module("accelerate")
            import_module("deltatune.training.trainer")
            from transformers.utils.logging import get_verbosity, set_verbosity
    except ImportError as cause:
        raise require_extra(str(cause.name or "transformers").partition(".")[0], "train") from cause
    verbosity = get_verbosity()
    chatty = logging.getLogger("bitsandbytes")  # accelerate imports it in passing, and it misses its optional kernels aloud
    level = chatty.level
    set_verbosity(logging.ERROR)
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        chatty.setLevel(level)


@contextmanager
def left_alone(backbone: nn.Module, deltas: Sequence[Delta]) -> Iterator[None]:
    """Other deltas do not train meanwhile, and the config's ``use_cache`` comes back; the backbone ends in eval mode."""
    others = [delta for delta in attached(backbone) if delta not in deltas and delta.trainable]
    for delta in others:
        delta.freeze()
    config = getattr(backbone, "config", None)
    before = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        for delta in others:
            delta.unfreeze()
        if "use_cache" in before:
            vars(config)["use_cache"] = before["use_cache"]
        elif config is not None:
            vars(config).pop("use_cache", None)
        backbone.eval()


@contextmanager
def recomputing(backbone: nn.Module) -> Iterator[None]:
    """Gradient checkpointing without re-entry, which needs no gradient at the frozen embeddings.

    Raises:
        InvalidValue: the backbone does not offer it.
    """
    verb = next((verb for verb in ("activation", "gradient") if hasattr(backbone, f"{verb}_checkpointing_enable")), None)
    if verb is None or not getattr(backbone, "supports_gradient_checkpointing", True):
        raise InvalidValue(f"`gradient_checkpointing` was asked for, but {type(backbone).__name__} does not offer it. Leave it out.")
    functions = [(module, module.__dict__.get("_gradient_checkpointing_func")) for module in backbone.modules()]
    getattr(backbone, f"{verb}_checkpointing_enable")(**{f"{verb}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(backbone, f"{verb}_checkpointing_disable")()
        for module, function in functions:
            if function is None:
                module.__dict__.pop("_gradient_checkpointing_func", None)


def give_back(trainer: DeltaTrainer) -> None:
    """Take back the mixed-precision forward that accelerate puts on the model, and let go of its references."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    vars(trainer.backbone).pop("_is_accelerate_prepared", None)
