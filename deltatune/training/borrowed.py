"""A backbone is borrowed for training: what the Trainer and its libraries set on it, and around it, is set back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from deltatune.backbones.quiet import quiet
from deltatune.errors import InvalidValue, missing_extra
from deltatune.injection.ledger import ledger_of
from deltatune.injection.switching import deltas as attached
from deltatune.training.life import Trained

if TYPE_CHECKING:
    from deltatune.training.trainer import DeltaTrainer

LEFT_BEHIND = frozenset(
    {
        "forward",
        "_original_forward",
        "_is_accelerate_prepared",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "_require_grads_hook",
        "_require_grads_hooks",
    }
)
"""Attributes that transformers and accelerate set on a model's modules and do not take away."""

PACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' 4-bit layers repack their weights at their first forward in eval mode, and cannot train any more then."""


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
        raise missing_extra(str(cause.name or "transformers").partition(".")[0], "train") from cause
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
def left_alone(backbone: nn.Module, deltas: Sequence[Trained]) -> Iterator[None]:
    """Other deltas do not train meanwhile, what the libraries leave behind is removed, and the backbone ends in eval mode."""
    others = [delta for delta in attached(backbone) if delta not in deltas and delta.trainable]
    for delta in others:
        delta.freeze()
    config = getattr(backbone, "config", None)
    use_cache = vars(config).get("use_cache", LEFT_BEHIND) if config is not None else None
    packing = [module for module in backbone.modules() if getattr(module, PACKS, False)]
    for module in packing:
        setattr(module, PACKS, False)
    had = {name: set(vars(module)) for name, module in backbone.named_modules()}
    try:
        yield
    finally:
        for delta in others:
            delta.unfreeze()
        for module in packing:
            setattr(module, PACKS, True)
        if use_cache is LEFT_BEHIND:
            vars(config).pop("use_cache", None)
        elif config is not None:
            config.use_cache = use_cache
        for name, module in backbone.named_modules():
            for attribute in LEFT_BEHIND - had.get(name, LEFT_BEHIND):
                vars(module).pop(attribute, None)
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
    # transformers makes the embeddings' output want gradients, which only re-entry needs; it would send every backward down there
    own_hooks = "_require_grads_hooks" not in vars(backbone)
    getattr(backbone, f"{verb}_checkpointing_enable")(**{f"{verb}_checkpointing_kwargs": {"use_reentrant": False}})
    if own_hooks and "_require_grads_hooks" in vars(backbone):
        backbone.disable_input_require_grads()  # type: ignore[operator]
    try:
        yield
    finally:
        getattr(backbone, f"{verb}_checkpointing_disable")()


@contextmanager
def recomputing_inputs(backbone: nn.Module) -> Iterator[None]:
    """The inputs of adapted modules are made anew in the backward, for the time of a training."""
    ledger = ledger_of(backbone)
    assert ledger is not None
    choice, before = ledger.around.recomputing, ledger.around.recomputing.is_on
    choice.is_on = True
    try:
        yield
    finally:
        choice.is_on = before


def give_back(trainer: DeltaTrainer) -> None:
    """Take back the mixed-precision forward that accelerate puts on the model, and let go of its references."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
