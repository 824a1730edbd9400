"""A backbone without its weights: made from the configuration alone, to look at and to try an attachment on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltatune.backbones import load_config, load_tokenizer
from deltatune.errors import Unsupported
from deltatune.tasks import get_task

if TYPE_CHECKING:
    from torch import nn

AUTO_CLASSES = {
    "encoder": "AutoModelForSequenceClassification",
    "decoder": "AutoModelForCausalLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}
"""The model that ``tune`` takes for a kind of backbone, unless the task wants another."""


def skeleton(name: str, task: str | None = None) -> nn.Module:
    """The model that ``tune`` would load, with memory that was never written: modules and shapes are true, values mean nothing.

    Args:
        name: alias, installed package, folder or hub id.
        task: whose head it gets; a model with a language-model head stays as it is where the task is put to it in words.

    Raises:
        UnknownName: nobody knows the backbone or the task.
        Unsupported: transformers has no model for the configuration.
    """
    import transformers

    from deltatune.backbones.quiet import quiet
    from deltatune.training.job import choose_framing, kind_of
    from deltatune.training.settings import Settings

    kind = kind_of(name)
    classes, options = [AUTO_CLASSES[kind], "AutoModel"], {}
    if task is not None:
        framing = choose_framing(get_task(task), kind, Settings(), load_tokenizer(name))
        classes = [framing.auto_class]
        options = {} if framing.outputs is None else {"num_labels": framing.outputs}
    config = load_config(name, **options)
    with quiet():
        model = _first([getattr(transformers, auto_class) for auto_class in classes], config, name)
    return model.eval()


def _first(factories: list[Any], config: Any, name: str) -> nn.Module:
    """The first of some auto classes that knows the configuration."""
    for factory in factories:
        try:
            with torch.device("meta"):
                model: Any = factory.from_config(config)
        except ValueError:  # transformers: unrecognised configuration class for this kind of AutoModel
            continue
        model.to_empty(device="cpu")  # allocated, but no page of it is touched
        model.tie_weights()
        return model.requires_grad_(False)  # type: ignore[no-any-return]
    raise Unsupported(
        f"transformers has no {factories[0].__name__} for `{name}` ({type(config).__name__}). Choose another backbone or task."
    )
