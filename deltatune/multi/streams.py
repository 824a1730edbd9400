"""Streams: in a batch that several jobs share, each job's dropout takes the job's own random numbers.

The noise of a job is drawn in the shape that its rows would have alone, tokens that only fill up to longer neighbours left out, and
in the order of the calls. So it depends on no neighbour, and on the CPU it is bit for bit that of the job run by itself. What cannot be
drawn so refuses: tensors whose axes do not say which rows and tokens they are of, and draws that do not come by here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deltatune.errors import Unsupported

Entries = tuple[Tensor, ...]
"""For each block, which entries along an axis are its own."""


@dataclass
class Places:
    """Where each job's tokens stand, by the length of an axis.

    Attributes:
        hidden: of hidden states and of queries.
        keys: of keys.
    """

    hidden: dict[int, Entries] = field(default_factory=dict)
    keys: dict[int, Entries] = field(default_factory=dict)

    @staticmethod
    def enter(places: dict[int, Entries], found: tuple[int, Entries]) -> bool:
        """Take in an axis; False where that length means something else already."""
        length, own = found
        known = places.setdefault(length, own)
        return all(torch.equal(one, other) for one, other in zip(known, own, strict=True))


class Stream:
    """The random numbers of one job; within ``with``, those of everybody.

    Args:
        seed: where they begin.
        device: on which its dropout draws besides the CPU.

    Attributes:
        held: the states of its generators, while nobody draws.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        from transformers import set_seed

        self.device = device
        self._outer: dict[str, Any] | None = None
        outer = states(device)
        set_seed(seed)
        self.held = states(device)
        restore(outer, device)

    def __enter__(self) -> Stream:
        self._outer = states(self.device)
        restore(self.held, self.device)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
        self.held = states(self.device)
        restore(self._outer, self.device)
        self._outer = None

    def generator(self) -> torch.Generator:
        """A generator that goes on where the stream stands; give it back with ``take``."""
        generator = torch.Generator(self.device)
        generator.set_state(self.held["cpu" if self.device.type == "cpu" else "cuda"])
        return generator

    def take(self, generator: torch.Generator) -> None:
        """The stream stands where the generator does."""
        self.held = {**self.held, "cpu" if self.device.type == "cpu" else "cuda": generator.get_state()}


def states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators, under the names of a Trainer's checkpoint."""
    import numpy

    found = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(held: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Set the global generators; of a GPU that of the device, the current one if left out."""
    import numpy

    random.setstate(held["python"])
    numpy.random.set_state(held["numpy"])
    torch.set_rng_state(held["cpu"])
    if "cuda" in held:
        torch.cuda.set_rng_state(held["cuda"], device or "cuda")


def _are_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Nobody has drawn between these states."""
    same = all(torch.equal(one[name], other[name]) for name in ("cpu", "cuda") if name in one)
    return same and one["python"] == other["python"] and repr(one["numpy"][2:]) == repr(other["numpy"][2:])


@contextmanager
def drawing_nothing(device: torch.device) -> Iterator[None]:
    """A forward for several jobs, in which nobody takes the random numbers of all.

    Raises:
        Unsupported: somebody did; the generators stand where they stood.
    """
    before = states(device)
    yield
    if not _are_equal(before, states(device)):
        restore(before, device)
        raise Unsupported(
            "The backbone draws random numbers for all rows of a batch at once (layers that are skipped at random, or an attention "
            "of PyTorch that drops), which cannot be told apart by jobs. Train its jobs apart (`tokens=0`)."
        )


@dataclass(frozen=True)
class Block:
    """The rows of one job in a batch: ``start`` to ``stop``."""

    start: int
    stop: int
    stream: Stream


class Streams:
    """The streams of a batch's jobs.

    Attributes:
        blocks: the jobs' rows, one behind the other.
        places: which tokens are each block's own.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.places = Places()
        self._generators: dict[int, torch.Generator] = {}
        self._owner: int | None = None

    @property
    def rows(self) -> int:
        """Of the batch."""
        return self.blocks[-1].stop

    @contextmanager
    def running(self, places: Places) -> Iterator[None]:
        """A forward with tokens at these places: dropout within takes the streams.

        Raises:
            Unsupported: the forward drew random numbers for all rows at once.
        """
        self.places = places
        self._generators = {number: block.stream.generator() for number, block in enumerate(self.blocks)}
        with drawing_nothing(self.blocks[0].stream.device), OwnDropout(self):
            yield
        for number, generator in self._generators.items():
            self.blocks[number].stream.take(generator)

    def owned(self, number: int | None) -> None:
        """What is dropped from now on belongs to one block as a whole, as a prefix does; None: to the rows it is of."""
        self._owner = number

    def dropped(self, x: Tensor, p: float, numbers: Sequence[int] | None = None) -> Tensor:
        """x with entries dropped; of blocks without a lane (0 in ``numbers``) none."""
        if self._owner is not None:
            return x * _noise(x.shape, p, self._generators[self._owner], x)
        if x.ndim == 2 and x.shape[0] != self.rows and x.shape[0] % self.rows == 0:  # tokens as rows
            return self._dropped(x.view(self.rows, x.shape[0] // self.rows, -1), p, numbers).flatten(0, 1)
        return self._dropped(x, p, numbers)

    def _dropped(self, x: Tensor, p: float, numbers: Sequence[int] | None) -> Tensor:
        """x (rows * factor, ...), with its axes of tokens at the places where each job's stand.

        Raises:
            Unsupported: it is not that, so that nobody knows which job's random numbers an entry takes.
        """
        found = [(axis, known.get(x.shape[axis])) for axis, known in self._axes(x.ndim)]
        axes = [(axis, own) for axis, own in found if own is not None]
        single = x.ndim == 3 and x.shape[1] == 1  # one token a row, as of what is pooled
        if x.shape[0] % self.rows or not 2 <= x.ndim <= 4 or (len(axes) < len(found) and not single):
            raise Unsupported(
                f"Dropout was asked of a tensor of shape {tuple(x.shape)} in a batch of {self.rows} rows, so that it cannot be told which "
                "job's random numbers it takes. Train the jobs of this backbone apart (`tokens=0`)."
            )
        factor = x.shape[0] // self.rows
        noise = torch.ones_like(x, memory_format=torch.contiguous_format)
        for number, block in enumerate(self.blocks):
            if numbers is not None and not any(numbers[block.start : block.stop]):
                continue
            own = [(axis, known[number]) for axis, known in axes]
            shape = [(block.stop - block.start) * factor, *x.shape[1:]]
            for axis, index in own:
                shape[axis] = len(index)
            drawn = _noise(shape, p, self._generators[number], x)
            _put(noise[block.start * factor : block.stop * factor], own, drawn)
        return x * noise

    def _axes(self, dimensions: int) -> tuple[tuple[int, dict[int, Entries]], ...]:
        """The axes of tokens: of hidden states (rows, tokens, width), and of attentions (rows, heads, queries, keys)."""
        if dimensions == 4:
            return (2, self.places.hidden), (3, self.places.keys)
        return ((1, self.places.hidden),) if dimensions == 3 else ()


def _noise(shape: Sequence[int], p: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """As PyTorch draws it on a CPU: 1 / (1 - p) with probability 1 - p, else 0."""
    noise = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p, generator=generator)
    return noise if p == 1 else noise.div_(1 - p)


def _put(part: Tensor, own: Sequence[tuple[int, Tensor]], drawn: Tensor) -> None:
    """part[..., own, ...] = drawn."""
    if not own:
        part.copy_(drawn)
    elif len(own) == 1:
        [(axis, index)] = own
        part.index_copy_(axis, index.to(part.device), drawn)
    else:
        (_, queries), (_, keys) = own
        part[:, :, queries.to(part.device)[:, None], keys.to(part.device)] = drawn


class OwnDropout(TorchFunctionMode):
    """While it is entered, dropout takes the streams; also that within ``scaled_dot_product_attention``."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over what draws, and pass on what does not."""
        if func in _TAKEN:
            return _TAKEN[func](self.streams, func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(streams: Streams, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return streams.dropped(input, p) if training and p else input


def _low_dropout(streams: Streams, func: Any, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(streams, func, input, p, train)


def _attention(
    streams: Streams,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's reference formula, with the streams' dropout: softmax(q k^T s + mask) v."""
    if not dropout_p:
        plain: Tensor = func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return plain
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5  # on both sides, as PyTorch does it
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = scores.softmax(-1) if attn_mask is None else torch._safe_softmax(scores, -1)  # queries that see nothing get nothing
    return streams.dropped(shares, dropout_p) @ value


def _refused(streams: Streams, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise Unsupported(
        f"The backbone draws random numbers by `{func.__name__}`, which cannot be told apart by jobs. Train its jobs apart (`tokens=0`)."
    )


_TAKEN: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _dropout,
    torch.dropout: _low_dropout,
    F.scaled_dot_product_attention: _attention,
    F.dropout1d: _refused,
    F.dropout2d: _refused,
    F.dropout3d: _refused,
    F.alpha_dropout: _refused,
    F.feature_alpha_dropout: _refused,
}
