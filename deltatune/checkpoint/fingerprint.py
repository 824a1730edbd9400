"""A cheap fingerprint of a backbone's own state: enough to tell a stranger, and to say in what it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.injection.ledger import ledger_of
from deltatune.injection.state import originals
from deltatune.structure.anatomy import modules_of
from deltatune.structure.index import Index, index

SAMPLES, ELEMENTS, ROWS = 24, 64, 16
VOCABULARY = ("embedding", "lm_head")
UNREAD = "unread"
"""Stands for the digest of a tensor that is quantised, sharded or offloaded; nothing is concluded from it."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells one backbone from another. Task heads do not count: they are freshly initialised.

    Attributes:
        class_name: of the backbone.
        parameters: how many it has; tied ones count once.
        structure: digest of their names and shapes, without the number of vocabulary rows.
        weights: digest of some elements of each of them.
        vocabulary: name -> rows, of token embeddings and language-model heads.
        samples: name -> ``dtype shape digest`` of some parameters, so that an error can name one.
    """

    class_name: str
    parameters: int
    structure: str
    weights: str
    vocabulary: dict[str, int]
    samples: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``delta.json``."""
        return {
            "class": self.class_name,
            "parameters": self.parameters,
            "structure": self.structure,
            "weights": self.weights,
            "vocabulary": self.vocabulary,
            "samples": self.samples,
        }


def fingerprint(backbone: nn.Module, known: Index | None = None) -> Fingerprint:
    """The fingerprint of the backbone as it was before anything was attached.

    Example:
        >>> fingerprint(nn.Sequential(nn.Linear(4, 2))).parameters
        2
    """
    ledger = ledger_of(backbone)
    sites = known or (ledger.index(backbone) if ledger is not None else index(backbone))
    before = originals(backbone)
    own = _own_parameters(backbone, sites)
    rows = {id(parameter) for site in sites if site.leaf in VOCABULARY for parameter in site.module._parameters.values()}
    structure, weights = hashlib.sha256(), hashlib.sha256()
    vocabulary: dict[str, int] = {}
    labels: dict[str, str] = {}
    looked_at: dict[str, Tensor] = {}
    for name in sorted(own):
        parameter = own[name]
        shape = list(parameter.shape)
        in_rows = id(parameter) in rows and bool(shape)
        if in_rows:
            vocabulary[name] = shape.pop(0)
        structure.update(f"{name} {shape}\n".encode())
        tensor = before.get(id(parameter), parameter)
        labels[name], elements = _sample(tensor, in_rows)
        if elements is not None:
            looked_at[name] = elements
    digests = _digests(looked_at)
    samples = {name: f"{label} {digests.get(name, UNREAD)}" for name, label in labels.items()}
    for name in samples:
        weights.update(digests.get(name, UNREAD).encode())
    unread = digests.keys() != samples.keys()
    names = list(samples)
    chosen = dict.fromkeys(names[k * len(names) // SAMPLES] for k in range(SAMPLES)) if names else {}
    return Fingerprint(
        class_name=type(backbone).__name__,
        parameters=len(own),
        structure=structure.hexdigest()[:16],
        weights=UNREAD if unread else weights.hexdigest()[:16],
        vocabulary=vocabulary,
        samples={name: samples[name] for name in chosen},
    )


def differences(saved: Fingerprint, found: Fingerprint, *, allow_vocabulary: bool = False) -> list[str]:
    """In what the backbone found differs from the one a delta was trained on, in words; empty if in nothing that can be seen."""
    said = []
    if saved.class_name != found.class_name:
        said.append(f"its class is {found.class_name} instead of {saved.class_name}")
    if saved.parameters != found.parameters:
        said.append(f"it has {found.parameters} parameters instead of {saved.parameters}")
    if not allow_vocabulary:
        for name in sorted(saved.vocabulary.keys() & found.vocabulary.keys()):
            if saved.vocabulary[name] != found.vocabulary[name]:
                said.append(f"`{name}` has {found.vocabulary[name]} vocabulary rows instead of {saved.vocabulary[name]}")
    absent = sorted(saved.samples.keys() - found.samples.keys())
    if absent:
        said.append(f"it lacks {_some(absent)}")
    elif saved.structure != found.structure:
        said.append("its parameters have other names or shapes")
    types, weights = _unlike(saved, found)
    if types:
        said.append(f"other types or shapes: {types[0]}")
    if weights:
        said.append(f"other weights in {_some(weights)}")
    elif not said and saved.weights != found.weights and UNREAD not in (saved.weights, found.weights):
        said.append("other weights in some of its parameters")
    return said


def _unlike(saved: Fingerprint, found: Fingerprint) -> tuple[list[str], list[str]]:
    """Samples of another type or shape, as sentences, and names of those with other weights."""
    types, weights = [], []
    for name in sorted(saved.samples.keys() & found.samples.keys()):
        old, new = saved.samples[name].split(" "), found.samples[name].split(" ")
        shape, other = old[1].split("x"), new[1].split("x")
        resized = name in saved.vocabulary and shape[1:] == other[1:]
        if old[0] != new[0] or (shape != other and not resized):
            types.append(f"`{name}` is {new[0]} {new[1]} instead of {old[0]} {old[1]}")
        elif old[2] != new[2] and UNREAD not in (old[2], new[2]):
            weights.append(name)
    return types, weights


def _some(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _own_parameters(backbone: nn.Module, sites: Index) -> dict[str, nn.Parameter]:
    """Name -> parameter, tied ones once, without those that only task heads hold."""
    heads = [f"{site.path}." for site in sites if site.leaf == "readout"]
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules_of(backbone).items():
        if any(f"{path}.".startswith(head) for head in heads):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
    return dict(found.values())


def _sample(tensor: Tensor, vocabulary: bool) -> tuple[str, Tensor | None]:
    """``dtype shape``, and the elements to look at; of a vocabulary only the first rows, whatever was appended.

    The elements are None where they cannot be read: of what is quantised, sharded or offloaded.
    """
    data = tensor.detach()
    plain = type(tensor.data) is Tensor
    kind = str(tensor.dtype).removeprefix("torch.")
    label = f"{kind if plain else f'{type(tensor.data).__name__}:{kind}'} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
    if not plain or tensor.is_meta:
        return label, None
    flat = (data[:ROWS] if vocabulary else data).reshape(-1)
    return label, flat[:: max(1, flat.numel() // ELEMENTS)]


def _digests(elements: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> digest of its elements. Those of one type and device are fetched together, as each fetch waits for the device."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in elements.items():
        alike.setdefault((tensor.dtype, tensor.device), []).append(name)
    found = {}
    for names in alike.values():
        fetched = torch.cat([elements[name] for name in names]).cpu()
        content, start, width = fetched.view(torch.uint8).numpy().data, 0, fetched.element_size()
        for name in names:
            end = start + elements[name].numel() * width
            found[name] = hashlib.sha256(content[start:end]).hexdigest()[:16]
            start = end
    return found
