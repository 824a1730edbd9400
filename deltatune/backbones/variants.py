"""Controls made from a backbone by its name: ``minilm@layers=3`` keeps its lowest layers, ``minilm@random`` draws all weights anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.errors import InvalidValue

MARK, RANDOM, LAYERS = "@", "random", "layers="
_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
"""Fields of a configuration that count layers; of an encoder-decoder, two of them."""


@dataclass(frozen=True)
class Variant:
    """How a control differs from the backbone it is made from.

    Attributes:
        layers: so many layers are kept, from the bottom; of an encoder-decoder, of both stacks. None keeps all.
        random: all weights are drawn anew, the same ones each time; only a task head follows the caller's seed.
    """

    layers: int | None = None
    random: bool = False

    def __str__(self) -> str:
        parts = [*([f"{LAYERS}{self.layers}"] if self.layers else []), *([RANDOM] if self.random else [])]
        return ",".join(parts)

    def shape(self, name: str, config: Any) -> None:
        """Write the number of layers into a configuration.

        Raises:
            InvalidValue: the backbone has fewer, or does not say how many it has.
        """
        if self.layers is None:
            return
        depths = [field for field in _DEPTHS if isinstance(getattr(config, field, None), int)]
        least = min((getattr(config, field) for field in depths), default=0)
        if not 1 <= self.layers <= least:
            found = f"has {least}" if depths else "does not say how many it has"
            raise InvalidValue(f"`{name}{MARK}{self}` asks for {self.layers} layers, but `{name}` {found}. Ask for 1 to {least or 'more'}.")
        for field in depths:
            setattr(config, field, self.layers)
        if isinstance(kinds := getattr(config, "layer_types", None), list):
            config.layer_types = kinds[: self.layers]


def parted(name: str) -> tuple[str, Variant]:
    """The backbone's own name, and the variant that is asked for.

    >>> parted("minilm@layers=3,random")
    ('minilm', Variant(layers=3, random=True))
    >>> parted("minilm")
    ('minilm', Variant(layers=None, random=False))

    Raises:
        InvalidValue: what stands behind the ``@`` is no variant.
    """
    base, mark, said = name.rpartition(MARK)
    if not mark or Path(name).expanduser().exists():
        return name, Variant()
    parts = said.split(",")
    numbers = [part.removeprefix(LAYERS) for part in parts if part.startswith(LAYERS)]
    unknown = [part for part in parts if part != RANDOM and not part.startswith(LAYERS)]
    if not base or unknown or len(set(parts)) < len(parts) or len(numbers) > 1 or not all(one.isdecimal() and int(one) for one in numbers):
        raise InvalidValue(
            f"The backbone `{name}` asks for the variant `{said}`. A variant is `{RANDOM}`, `{LAYERS}N`, or both with a comma between, "
            f"as in `minilm{MARK}{LAYERS}3`."
        )
    return base, Variant(int(numbers[0]) if numbers else None, RANDOM in parts)


def drawn(factory: Any, config: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model of random weights: the backbone's are the same each time, those of a task head go by the caller's seed.

    Args:
        factory: transformers' auto class.
        config: with the shape.
        dtype: of the parameters.
        options: of ``from_config``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = factory.from_config(config, dtype=dtype, **options)
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        for name, child in model.named_children():
            if name != prefix:
                child.apply(_redrawn(model))
    return model


def _redrawn(model: Any) -> Any:
    def redraw(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            vars(parameter).pop("_is_hf_initialized", None)
        model._init_weights(module)

    return redraw
