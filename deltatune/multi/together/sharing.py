"""Sharing: which batches share a forward, and whether that pays at all."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from deltatune.multi.together.host import Host, Task
from deltatune.multi.together.portion import Call

ALONE = 0
"""Most tokens of a shared forward: none is shared."""

FIRST = 256
"""The smallest size that is tried."""

SECONDS = 5.0
"""After so long a probe ends with what it has seen."""

ROUNDS = 3
"""Each size is tried so often at most; the first time counts least, because plans are made in it."""

_clock = time.perf_counter


def bins(calls: Sequence[Call], tokens: int) -> list[list[int]]:
    """Numbers of the calls that share a forward of at most so many tokens, padding included; a longer call is alone.

    The longest go first, each to the first that has room for it, so that calls of like length come together.

    >>> texts = [Call({"input_ids": torch.zeros(rows, length)}) for rows, length in ((1, 9), (1, 30), (2, 10), (1, 29))]
    >>> bins(texts, tokens=60)
    [[1, 3], [0, 2]]
    """
    found: dict[Hashable, list[Bin]] = {}
    for number in sorted(range(len(calls)), key=lambda k: -_length(calls[k])):
        several = found.setdefault(calls[number].kind, [])
        room = next((one for one in several if one.tokens(calls[number]) <= tokens), None)
        if room is None:
            several.append(room := Bin())
        room.add(number, calls[number])
    return [sorted(one.numbers) for several in found.values() for one in several]


@dataclass
class Bin:
    """Calls that share a forward.

    Attributes:
        text: tokens of the longest text.
        target: of what a decoder writes, the longest; it may be another call's.
        rows: of all.
        numbers: which they are.
    """

    text: int = 0
    target: int = 0
    rows: int = 0
    numbers: list[int] = field(default_factory=list)

    def tokens(self, call: Call) -> int:
        """Tokens of the forward, with one more call."""
        return (self.rows + call.rows) * (max(self.text, call.length()) + max(self.target, call.length(target=True)))

    def add(self, number: int, call: Call) -> None:
        """Take in a call."""
        self.text, self.target = max(self.text, call.length()), max(self.target, call.length(target=True))
        self.rows += call.rows
        self.numbers.append(number)


def _length(call: Call) -> int:
    return call.length() + call.length(target=True)


def _tokens(calls: Sequence[Call]) -> int:
    longest = max(call.length() for call in calls) + max(call.length(target=True) for call in calls)
    return sum(call.rows for call in calls) * longest


def sizes(calls: Sequence[Call]) -> list[int]:
    """Sizes worth trying: doubled until one forward holds all, without those that share alike."""
    found: dict[tuple[tuple[int, ...], ...], int] = {}
    tokens = FIRST
    while True:
        parted = bins(calls, tokens)
        found.setdefault(tuple(map(tuple, parted)), tokens)
        if tokens >= _tokens(calls):
            return [size for parts, size in found.items() if len(parts) < len(calls)]
        tokens *= 2


def probe(host: Host, tasks: Sequence[Task], calls: Sequence[Call]) -> int:
    """The size under which these batches run fastest, ``ALONE`` where sharing loses; nothing of the tenants changes.

    Args:
        host: where they run.
        tasks: one batch of each tenant.
        calls: what each asks of the backbone.
    """
    tried = [ALONE, *sizes(calls)]
    best = dict.fromkeys(tried, float("inf"))
    began = time.perf_counter()
    for number in range(ROUNDS):
        for size in tried:
            best[size] = min(best[size], _seconds(host, tasks, calls, size))
        if time.perf_counter() - began > SECONDS and number:
            break
    return min(tried, key=best.__getitem__)


def _seconds(host: Host, tasks: Sequence[Task], calls: Sequence[Call], size: int) -> float:
    """Of forwards and backwards under one size."""
    held = [task.tenant.stream.held for task in tasks]
    began = _clock()
    if size == ALONE:
        for task in tasks:
            task.tenant.alone([task.batch])
    else:
        for one in bins(calls, size):
            host.run([tasks[k] for k in one], [calls[k] for k in one])
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    taken = _clock() - began
    for task, before in zip(tasks, held, strict=True):
        task.tenant.forget()
        task.tenant.stream.held = before
    return taken
