"""Small things about examples and batches that framings and heads have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Features = dict[str, Any]
Watch = Callable[[Sequence[list[int]]], Iterable[list[int]]]
"""Passes batches of row numbers on, one by one, and may show how far it is."""
IGNORED = -100
"""The label that PyTorch's cross-entropy leaves out."""
SEVERAL = "several"
"""Of an example that is several inputs, such as one an option: they lie here."""


def padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of unequal length -> (batch, longest), filled with ``value`` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def batched(features: Sequence[Features], pad: int | None) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and, where there are any, ``labels``, each padded on the right to the longest."""
    ids = [feature["input_ids"] for feature in features]
    batch = {"input_ids": padded(ids, int(pad or 0)), "attention_mask": padded([[1] * len(one) for one in ids], 0)}
    if "labels" in features[0]:
        batch["labels"] = padded([feature["labels"] for feature in features], IGNORED)
    return batch


def moved(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device; where its weights are offloaded, their hooks move it."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return dict(batch) if device.type == "meta" else {name: tensor.to(device) for name, tensor in batch.items()}


def without(batch: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """What of a batch goes to the model: all but ``labels`` and the named entries."""
    return {name: tensor for name, tensor in batch.items() if name != "labels" and name not in names}


def inputs_of(features: Features) -> list[Features]:
    """What the backbone is given for one example: itself, or its several inputs."""
    inputs: list[Features] = features.get(SEVERAL, [features])
    return inputs


def length_of(features: Features) -> int:
    """Tokens of one example, by which batches are made; of several inputs those of the longest."""
    return max(map(length_of, features[SEVERAL])) if SEVERAL in features else len(features["input_ids"])


def tokens_of(features: Features) -> int:
    """Tokens of all inputs of one example.

    >>> tokens_of({"input_ids": [1, 2, 3]}), tokens_of({SEVERAL: [{"input_ids": [1, 2]}, {"input_ids": [1]}]})
    (3, 3)
    """
    return sum(map(tokens_of, features[SEVERAL])) if SEVERAL in features else len(features["input_ids"])


def items(batch: Mapping[str, Tensor]) -> Tensor:
    """How many items of a batch are learnt: rows, words, or an answer's tokens."""
    return batch["labels"].ne(IGNORED).sum()


def by_length(inputs: Sequence[Features], batch_size: int) -> list[list[int]]:
    """The numbers of encoded inputs in batches, the shortest first, so that those of like length share one."""
    order = sorted(range(len(inputs)), key=lambda index: length_of(inputs[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_batches(model: nn.Module, inputs: Sequence[Features], batch_size: int, watch: Watch = iter) -> Iterator[list[int]]:
    """Numbers of the inputs, batch by batch as ``watch`` passes them on, while the model is in eval mode."""
    with evaluating(model), torch.no_grad():
        yield from watch(by_length(inputs, batch_size))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a moment; each module gets back its own mode, since frozen layers may differ from trained ones."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
